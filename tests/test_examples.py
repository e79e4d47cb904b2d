"""The examples run as they are, and do what they say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_learns_and_drops() -> None:
    figures: dict[str, Any] = load("own_trainer").main(["--steps", "40"])
    assert figures["last_loss"] < figures["first_loss"]
    assert figures["realised_drop_rate"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("options", [[], ["--masks", "exact", "--calibrate"]])
def test_the_plain_loop_learns_and_drops(options: list[str]) -> None:
    report = load("plain_loop").main(["--steps", "60", *options])
    assert report["losses"][-1] < report["losses"][0]
    assert report["realised_drop_rate"] == pytest.approx(0.5, abs=0.05)
    rates = [branch["rate"] for branch in report["branches"]]
    assert len(set(rates)) > 1 or not options


def test_the_accelerate_loop_learns_and_drops() -> None:
    report = load("accelerate_loop").main(["--steps", "30"])
    assert report["losses"][-1] < report["losses"][0]
    assert report["realised_drop_rate"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["accelerate_loop", "own_trainer"])
@pytest.mark.parametrize("launch", ["--cpu --num_processes=1", "--multi_gpu --num_processes=2"])
def test_accelerate_launches_an_example(example: str, launch: str) -> None:
    options = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch.split(), *options]
    script = [str(EXAMPLES / f"{example}.py"), "--steps", "10"]
    done = subprocess.run([*command, *script], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stdout.splitlines() if "drop rate" in line]
    count = int(launch[-1])
    assert said[0].startswith(f"{count} processes") if example == "accelerate_loop" else len(said) == count


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert cells
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
