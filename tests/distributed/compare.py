"""What the tests of all engines compare."""

from __future__ import annotations

import functools
from typing import Any

import dropbp
from tests.common.engine_models import llama_loss
from tests.distributed.training import add_lora, alone, local_batch, make_model

TOLERANCE = 1e-4


def result(rank: dict[str, Any], case: str) -> Any:
    entry = rank.get(case, {"error": "an earlier case failed"})
    assert "result" in entry, entry.get("trace", entry)
    return entry["result"]


@functools.cache
def reference(steps: int, lora: bool = False, zeros: bool = False) -> tuple[list[float], list[list[bool]]]:
    losses, masks = alone(steps, add_lora if lora else lambda model: model, zeros)
    return losses, [list(mask) for mask in masks]


def assert_as_alone(ranks: list[dict[str, Any]], case: str, **options: Any) -> None:
    """Losses within the tolerance of one process, masks the same, on every rank."""
    for rank in ranks:
        losses, masks, *_ = result(rank, case)
        assert_same_run(losses, masks, **options)


def assert_same_run(losses: list[float], masks: list[Any], **options: Any) -> None:
    expected, drawn = reference(len(losses), **options)
    assert masks == drawn
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < TOLERANCE


@functools.cache
def sensitivities(method: str) -> list[float]:
    """Sensitivities and rates of the global batch in one process."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    found = handle.calibrate(lambda: llama_loss(model, local_batch(0)), method=method)
    return [*found.sensitivities, *found.rates]
