"""Counts of compiled graphs: the committed figures say what the documentation says, and the page is made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dropbp.bench.recipes import command as recipes
from dropbp.bench.recipes import tables

from dropbp.errors import ConfigError

DEFAULTS = ("layer-groups-rehearsed", "nested")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found = recipes.read(recipes.RESULTS / recipes.FILE)
    assert found["cases"], "run: python -m bench recipes"
    return found


def cases(record: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [each for each in record["cases"] if all(each["case"][key] == value for key, value in wanted.items())]


def late(counts: list[int]) -> int:
    return sum(counts[len(counts) // 2 :])


def test_page_is_rendered_from_the_committed_file(record: dict[str, Any]):
    page = recipes.ROOT / "docs" / recipes.PAGE
    assert page.read_text(encoding="utf-8") == tables.render(record), "run: python -m bench recipes --tables-only"


def test_every_planned_case_was_measured(record: dict[str, Any]):
    planned = [case for trainer in recipes.TRAINERS for case in recipes.make_cases(trainer, recipes.Plan())]
    assert sorted(map(json.dumps, planned)) == sorted(json.dumps(each["case"]) for each in record["cases"])


def test_defaults_compile_nothing_late_and_the_naive_design_does(record: dict[str, Any]):
    for design in DEFAULTS:
        assert all(late(each["recompiles"]) == 0 for each in cases(record, table="designs", design=design))
    assert all(late(each["recompiles"]) > 0 for each in cases(record, table="designs", design="naive"))


def test_recipes_of_the_defaults_do_not_depend_on_depth(record: dict[str, Any]):
    for design in DEFAULTS:
        for method in ("full", "lora"):
            found = cases(record, table="depth", design=design, method=method)
            assert len(found) == 3 and len({each["recipes"] for each in found}) == 1


def test_peak_memory_falls_with_the_drop_rate(record: dict[str, Any]):
    for design in DEFAULTS:
        for method in ("full", "lora"):
            found = cases(record, table="memory", design=design, method=method)
            peaks = [each["peak_bytes"] for each in sorted(found, key=lambda each: each["case"]["drop_rate"])]
            assert len(peaks) == 5 and peaks == sorted(peaks, reverse=True)


def test_results_survive_a_round_trip_and_damage_is_an_error(record: dict[str, Any], tmp_path: Path):
    file = tmp_path / recipes.FILE
    file.write_text(recipes.to_text(record))
    assert recipes.read(file) == record
    file.write_text('{"schema": 1}')
    with pytest.raises(ConfigError, match="no result file of recipes"):
        recipes.read(file)
    assert recipes.read(tmp_path / "none.json")["cases"] == []
