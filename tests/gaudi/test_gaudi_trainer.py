"""The real, unmodified GaudiTrainer of optimum-habana trains on the simulated HPU as it does on Gaudi."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gaudi, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # optimum-habana calls `pip` by name: the one of this environment must come first.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    command = [sys.executable, "-W", "ignore", "-m", "tests.gaudi.gaudi_run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(json.loads(result.removeprefix("RESULT ")))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_trainer_runs_lazily_without_late_recompiles_and_resumes_exactly(method: str, accumulation: int):
    result = run("--accumulation", str(accumulation), *(["--lora"] if method == "lora" else []))
    report = result["report"]
    assert result["device"] == "hpu"
    assert result["optimizer"] == "FusedAdamW"
    assert report["mode"] == "lazy"
    assert len(report["steps"]) == 10
    assert report["late_recompiles_per_step"] == 0, report["steps"]
    assert report["launches_per_step"] < 12
    assert result["losses"][-1] < result["losses"][0]
    assert result["resume_difference"] == 0.0


def test_recipes_of_plain_training_do_not_depend_on_depth():
    """One graph holds the whole model, so a deeper model has other recipes, not more of them."""
    counts = {layers: run("--layers", str(layers), "--steps", "6")["report"]["recipes"] for layers in (2, 6)}
    assert counts[2] == counts[6], counts
