"""The recorded cost of the callback is below its target, and the measurement still runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dropbp.bench.overhead import callback as callback_overhead

RESULTS = Path(__file__).parents[1] / "bench" / "results" / callback_overhead.KIND


def test_the_recorded_overhead_is_below_one_percent_of_a_step():
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")]
    assert records
    assert all(record["status"] == "finished" and record["share"] < record["target"] == 0.01 for record in records)


@pytest.mark.filterwarnings("ignore")
def test_the_time_of_every_step_and_of_the_callback_in_it_is_measured():
    found = callback_overhead.measure(layers=2, width=32, steps=4, batch_size=2, sequence_length=8)
    assert len(found["step_s"]) == len(found["events_s"]) == 4
    assert all(0 < events < step for events, step in zip(found["events_s"], found["step_s"], strict=True))
