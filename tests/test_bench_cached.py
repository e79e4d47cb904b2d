"""`dropbp bench activation_cache`, and its section of the page on results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dropbp.bench import parts
from dropbp.bench.report import cached as report
from dropbp.bench.throughput import cached


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("results")
    assert parts.main(["activation_cache", "--smoke", "--only", "full-0.75", "--output", str(output)]) == 0
    return output


def test_a_run_compares_four_ways_to_train_step_by_step(folder: Path) -> None:
    record = json.loads((folder / cached.KIND / "full-0.75.json").read_text())
    assert list(record["step_s"]) == list(cached.VARIANTS)
    assert {len(times) for times in record["step_s"].values()} == {cached.EPOCHS * 3}
    assert record["cache"]["hits"] == 2 * record["cache"]["rows"] == 12
    assert sum(record["shortened"]) == record["cache"]["forwards_shortened"] > 0
    assert cached.figures(record)["loss_difference"] < 1e-4


def test_a_machine_that_slows_down_changes_no_ratio_of_steps(folder: Path) -> None:
    record = json.loads((folder / cached.KIND / "full-0.75.json").read_text())
    before = cached.figures(record)
    for times in record["step_s"].values():
        times[:] = [time_s * (1 + place) for place, time_s in enumerate(times)]
    after = cached.figures(record)
    for name in ("shortened_step", "uncached_step"):
        assert after[name] == pytest.approx(before[name])


def test_the_page_shows_each_run_beside_its_target(folder: Path) -> None:
    section = report.section(folder)
    assert "| full, p = 0.75 |" in section and "0.30 (" in section
    assert section.count("\n| ") == 2, "a head and a row"


def test_without_runs_there_is_no_section(tmp_path: Path) -> None:
    assert report.section(tmp_path) == ""


def test_a_named_model_is_measured_in_bf16_and_has_a_table_of_its_own(tmp_path: Path) -> None:
    options = ["--model", "llama-4x64", "--only", "lora-0.75", "--steps", "2", "--output", str(tmp_path)]
    assert parts.main(["activation_cache", *options]) == 0
    record = json.loads((tmp_path / cached.KIND / "llama-4x64--cpu--lora-0.75.json").read_text())
    assert record["cache"]["refused"] is None and sum(record["shortened"]) > 0
    section = report.section(tmp_path)
    assert "llama-4x64 in bfloat16 on one" in section and "| lora, p = 0.75 |" in section
