"""docs/distributed.md says what bench/results/distributed.json holds, and that holds what was promised."""

from __future__ import annotations

import json

from tests.distributed.compare import TOLERANCE
from tests.distributed.record import ACCELERATED, PAGE, RESULTS, RUNS, with_tables


def test_the_page_is_made_from_the_recorded_figures():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page, json.loads(RESULTS.read_text(encoding="utf-8"))) == page


def test_every_engine_stays_at_the_losses_of_one_process():
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(record["largest_loss_difference"]) == set(record["bytes_per_step"]) == set(RUNS)
    assert max(record["largest_loss_difference"].values()) < TOLERANCE
    assert set(record["accelerate_launch_loss_difference"]) == set(ACCELERATED)
    assert max(record["accelerate_launch_loss_difference"].values()) < TOLERANCE
    assert record["steps"] == 50


def test_fewer_bytes_are_sent_the_more_is_dropped():
    for engine, sent in json.loads(RESULTS.read_text(encoding="utf-8"))["bytes_per_step"].items():
        if engine != "DDP":
            assert sent["1.0"] < sent["0.5"] < sent["0.0"], engine
