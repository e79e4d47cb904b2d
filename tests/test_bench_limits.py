"""Time limits of the bench, and the guesses that keep the search for the largest size short."""

from __future__ import annotations

import argparse
import math
from typing import Any, cast

import pytest
import torch
from dropbp.bench.common import options
from dropbp.bench.common.models import build_model
from dropbp.bench.common.options import TimeLimit
from dropbp.bench.common.presets import ThroughputPreset, Training
from dropbp.bench.common.setup import PLAIN, Lane, Variant, build_batch, build_optimizer, loss_of
from dropbp.bench.memory.probe import Probe, Workplace
from dropbp.bench.memory.search import guess_border, guess_tried, largest_counted, tried_in_a_process
from dropbp.bench.report import tables
from dropbp.bench.throughput.rounds import Bench

from dropbp.device import get_device
from dropbp.errors import ConfigError
from dropbp.estimate.footprint import largest
from dropbp.memory import track_tensor_bytes

TINY = "llama-4x64"
CPU = get_device("cpu")


# -- the border


def curved(size: int) -> int:
    return 1000 + 10 * size + size * size // 1000


class Counted:
    """A probe of a known peak, that of the mask that needs most; another mask needs a tenth less."""

    def __init__(self) -> None:
        self.steps = 0

    def peak_bytes(self, batch_size: int, sequence_length: int, enough_bytes: float = math.inf) -> int:
        peak = curved(sequence_length)
        self.steps += 1 if peak > enough_bytes else 2
        return peak

    def rough_peak_bytes(self, batch_size: int, sequence_length: int) -> int:
        self.steps += 1
        return curved(sequence_length)


def test_counted_border_of_a_nearly_linear_peak_takes_few_steps() -> None:
    probe = Counted()
    size, asked = largest_counted(cast(Probe, probe), lambda size: (1, size), 100_000, 16, 1 << 16)
    assert curved(size) <= 100_000 < curved(size + 16)
    assert all(entry["peak_bytes"] == curved(entry["size"]) for entry in asked)
    assert {size, size + 16} <= {entry["size"] for entry in asked}
    assert probe.steps < 12


def test_guess_stays_within_what_is_asked() -> None:
    assert guess_border(lambda size: 10 * size, 10_000, 8, 1 << 12) == 1000
    assert guess_border(lambda size: 10 * size, 10_000, 8, 64) == 64
    assert guess_border(lambda size: 5, 10_000, 8, 64) == 8


@pytest.mark.parametrize(
    ("variant", "accumulated"),
    [(PLAIN, True), (Variant("exact", 0.5), True), (Variant("exact", 0.5), False), (Variant("nested", 0.75), True)],
)
def test_shared_workplace_counts_what_a_whole_step_of_each_mask_needs(variant: Variant, accumulated: bool) -> None:
    training = Training("full", "fp32")
    probe = Probe(Workplace(TINY, training), variant, accumulated=accumulated, masks=3)
    counted = probe.peak_bytes(2, 96)
    assert probe.peak_bytes(2, 96) == counted and probe.rough_peak_bytes(2, 96) == counted
    assert counted == max(whole_steps(training, variant, accumulated, 3))


def whole_steps(training: Training, variant: Variant, accumulated: bool, count: int) -> list[int]:
    """The literal way: a model of its own on the meta device, and each mask's step with the optimizer's."""
    meta = get_device("meta")
    lane = Lane(variant, build_model(TINY, training, "meta"), meta)
    optimizer, ids_BS = build_optimizer(lane.model, training.tuning), build_batch(TINY, 2, 96, "meta")
    peaks = []
    for mask in [None, *lane.peak_memory_masks(count)]:  # the first makes the optimizer's states and is drawn by no one
        given = accumulated or not peaks
        for parameter in lane.model.parameters():
            parameter.grad = torch.ones_like(parameter) if given else None
        if not peaks:
            optimizer.step()
            peaks.append(0)
            continue
        with lane.masked(mask), track_tensor_bytes(lane.model, optimizer, ids_BS) as tracked:
            loss_of(lane.model, ids_BS).backward()
            optimizer.step()
        peaks.append(tracked.peak_bytes)
    return peaks


def test_masks_after_one_that_is_beyond_the_budget_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = Probe(Workplace(TINY, Training("full", "fp32")), Variant("exact", 0.5), masks=3)
    whole = probe.peak_bytes(1, 64)
    asked: list[Any] = []
    count = probe._peak_with
    monkeypatch.setattr(probe, "_peak_with", lambda *given: asked.append(given[0]) or count(*given))  # type: ignore[func-returns-value]
    assert probe.peak_bytes(1, 64, enough_bytes=1.0) == whole and len(asked) == 1
    assert probe.peak_bytes(1, 64, enough_bytes=whole) == whole and len(asked) == 4
    assert len(set(asked)) == 3


class Card:
    """A device whose peak memory follows from what was tried last."""

    name = "cuda"

    def __init__(self, bytes_of_size: Any) -> None:
        self.bytes_of_size, self.tried = bytes_of_size, [0]

    def fits(self, size: int) -> bool:
        self.tried.append(size)
        return bool(self.bytes_of_size(size) <= 96_000)

    def reset_peak_memory(self) -> None:
        pass

    def max_memory_allocated_bytes(self) -> int:
        return int(self.bytes_of_size(self.tried[-1]))

    def memory_limit_bytes(self) -> int:
        return 100_000


@pytest.mark.parametrize(
    ("bytes_of_size", "guess"),
    [(lambda size: 6000 + 10 * size, 8960), (lambda size: 97_000, None), (lambda size: 5, 1 << 20)],
    ids=["linear", "nothing fits", "everything fits"],
)
def test_guess_on_an_accelerator_is_made_from_small_tries(bytes_of_size: Any, guess: int | None) -> None:
    card = Card(bytes_of_size)
    assert guess_tried(cast(Any, card), card.fits, 128, 1 << 20) == guess
    assert card.tried[1:3] in ([128, 512], [128, 128])


@pytest.mark.parametrize(("per_row", "border"), [(10_000, 9), (2_000, 48), (300, 320), (9, 4096)])
def test_a_border_is_found_in_few_tries_where_the_optimizer_hides_what_small_batches_need(
    per_row: int, border: int
) -> None:
    card = Card(lambda size: max(60_000, per_row * size))
    guess = guess_tried(cast(Any, card), card.fits, 1, 4096)
    assert largest(card.fits, step=1, most=4096, guess=guess) == border
    assert len(set(card.tried)) <= 22 and max(card.tried) <= 16 * border


def test_cpu_is_tried_without_a_guess() -> None:
    assert guess_tried(CPU, lambda size: pytest.fail("tried"), 128, 1 << 20) is None


# -- time


@pytest.mark.parametrize(
    ("device", "minutes", "seconds"), [("cpu", None, math.inf), ("cuda", None, 600), ("hpu:0", 2.0, 120)]
)
def test_a_run_on_an_accelerator_ends_after_ten_minutes(device: str, minutes: float | None, seconds: float) -> None:
    left_s = options.limit_of(argparse.Namespace(device=device, minutes=minutes)).left_s()
    assert seconds - 5 <= left_s <= seconds


def test_no_time_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="--minutes 0 must be above 0"):
        options.limit_of(argparse.Namespace(device="cuda", minutes=0))


def test_rounds_end_early_but_never_before_one_that_counts() -> None:
    preset = ThroughputPreset(TINY, (Training("full", "fp32"),), (0.5,), 1, 16)
    bench = Bench(preset, preset.trainings[0], [PLAIN, Variant("exact", 0.5)], CPU)
    bench.run_rounds(1, 50, "over", TimeLimit(0))
    assert {len(steps) for steps in bench.steps.values()} == {1}
    assert {len(steps) for steps in bench.warmup_steps.values()} == {1}
    bench.run_rounds(0, 3, "endless", TimeLimit())
    assert {len(steps) for steps in bench.steps.values()} == {4}


def test_process_whose_time_is_over_is_ended_and_that_is_a_result() -> None:
    task = {"vary": "sequence_length", "fixed": 1, "step": 32, "most": 1 << 20, "accumulated": True}
    found, asked = tried_in_a_process(TINY, Training("full", "fp32"), Variant("nested", 0.5), "cpu", task, 0.5)
    assert found == max((entry["size"] for entry in asked if entry.get("fits")), default=0)
    assert asked[-1] == {"ended_after_s": 0.5}


def test_page_says_how_many_rounds_a_run_really_had() -> None:
    assert tables._rounds_done({"steps": {"plain": [1, 2], "exact": [1]}}) == 2
    assert tables._rounds_done({"steps": {}}) == 0
