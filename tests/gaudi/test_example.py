"""The example for Gaudi runs as it is, on the simulated HPU with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gaudi, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "gaudi_llama3_8b_lora.py"


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    from tests.common.tiny import save_model

    return save_model(tmp_path / "model", layers=4)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(200)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_example_trains_saves_and_compiles_nothing_late(tiny_model: Path, rows: Path, tmp_path: Path):
    report, output = tmp_path / "report.json", tmp_path / "out"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    simulated = [sys.executable, "-W", "ignore", "-m", "dropbp.backends.hpu_simulator", "--json", str(report)]
    options = ["--model", str(tiny_model), "--dataset", str(rows), "--output", str(output), "--drop-rate", "0.75"]
    sizes = ["--max-length", "24", "--batch", "4", "--max-steps", "24", "--warmup-steps", "2", "--logging-steps", "3"]
    done = subprocess.run(
        [*simulated, str(EXAMPLE), *options, *sizes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backward was skipped" in done.stdout
    assert (output / "adapter_model.safetensors").is_file()
    steps = json.loads(report.read_text())["steps"]
    assert len(steps) == 24
    assert sum(step["recompiles"] for step in steps[12:]) == 0, steps
