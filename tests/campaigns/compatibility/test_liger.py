"""Models patched as Liger does: branches are found, forward and gradients are right."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.compatibility.liger import check, stand_in

ROOT = Path(__file__).parents[3]
INSTALLED = all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton"))


def test_a_model_with_ligers_patches_drops_its_branches() -> None:
    check(stand_in)


@pytest.mark.skipif(not INSTALLED, reason="liger-kernel and triton are not installed")
def test_ligers_own_kernels_run_under_dropbp_in_tritons_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-m", "tests.campaigns.compatibility.liger"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("right\n")
