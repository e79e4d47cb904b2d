"""The real, unmodified GaudiTrainer of optimum-habana trains on the simulated HPU as it does on Gaudi."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gaudi, pytest.mark.timeout(1800)]  # minutes on a loaded machine

ROOT = Path(__file__).resolve().parents[2]


LATE = 10  # a hundred steps after this one compile nothing


def results(module: str, *arguments: str) -> list[dict[str, Any]]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    # optimum-habana calls `pip` by name: the one of this environment must come first.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    command = [sys.executable, "-W", "ignore", "-m", f"tests.gaudi.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def run(*arguments: str) -> dict[str, Any]:
    (result,) = results("gaudi_run", *arguments)
    return result


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


@pytest.mark.parametrize("method", ["full", "lora"])
def test_dropping_compiles_nothing_in_a_hundred_steps(method: str):
    """Default masks and random ones, p=.5 to .875, accumulation 1 and 2, with fused AdamW and clipping."""
    cases = results("dropbp_run", method)
    assert len(cases) == 6
    for case in cases:
        assert len(case["recompiles"]) == LATE + 100
        assert sum(case["recompiles"][LATE:]) == 0, case
        assert abs(case["realised_drop_rate"] - case["drop_rate"]) < 0.04, case
        assert case["losses"][-1] < case["losses"][0], case
        assert case["optimizer"] == "FusedAdamW" and case["put_back"]


def test_recipes_of_dropping_do_not_depend_on_depth():
    cases = results("dropbp_run", "depth")
    for lora in (False, True):
        found = {case["layers"]: case["recipes"] for case in cases if case["lora"] is lora}
        assert set(found) == {6, 16, 32} and len(set(found.values())) == 1, found
    assert all(sum(case["recompiles"][LATE:]) == 0 for case in cases), cases


def test_gaudi_layers_are_found_and_dropped_exactly():
    """They call their attention by other methods than `forward`."""
    cases = results("dropbp_run", "layers")
    assert [case["layer"] for case in cases] == [
        "GaudiLlamaDecoderLayer",
        "GaudiMistralDecoderLayer",
        "GaudiQwen2DecoderLayer",
    ]
    for case in cases:
        assert case["branches"] == [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
        assert case["forward_equal"]
        assert case["without_gradient"] == case["expected_without"]
        assert any("self_attn.q_proj" in name for name in case["without_gradient"])
        assert case["largest_difference"] == 0.0
        assert case["trained"] > 0


def test_trainer_class_drops_and_refuses_hpu_graphs():
    (case,) = results("dropbp_run", "subclass")
    assert case["name"] == "DropBPGaudiTrainer"
    assert sum(case["recompiles"][LATE:]) == 0, case
    assert abs(case["realised_drop_rate"] - 0.75) < 0.05
    assert "use_hpu_graphs_for_training=False" in case["refusal"]


def test_resumed_run_ends_where_the_whole_one_does():
    """With the optimizer's counts of steps, which are the branches' own."""
    (case,) = results("dropbp_run", "resume")
    assert case["difference"] == 0.0
