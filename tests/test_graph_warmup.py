"""The first masks on a lazy device: those of the mask sampler, in an order that meets everything new early."""

from __future__ import annotations

import random

import pytest

import dropbp
from dropbp.lazy.warmup import MAX_FORWARDS, GraphWarmup, Layer
from tests.common.engine_models import llama_loss, tiny_llama

BRANCHES = 8
EVERYTHING = (1 << BRANCHES) - 1
LAYERS = [Layer("block", 0b11 << i) for i in range(0, BRANCHES, 2)]


def warmup(layers: list[Layer] = LAYERS) -> GraphWarmup:
    return GraphWarmup(layers, EVERYTHING, lambda dropped: 0)


def masks(seed: int, drop_rate: float = 0.5, count: int = 400) -> list[int]:
    draw = random.Random(seed)
    return [sum(1 << i for i in range(BRANCHES) if draw.random() < drop_rate) for _ in range(count)]


def run(one: GraphWarmup, upcoming: list[int], accumulation: int = 1) -> list[int]:
    """Run it to its end, as a handle does; the masks it chose."""
    chosen, with_gradient = [], 0
    for forward in range(10 * MAX_FORWARDS):
        if forward % accumulation == 0:
            with_gradient = 0
        dropped = one.next(with_gradient, lambda: upcoming)
        if dropped is None:
            return chosen
        one.note(dropped, with_gradient)
        with_gradient |= EVERYTHING & ~dropped
        chosen.append(dropped)
    raise AssertionError("the warm-up did not end")


@pytest.mark.parametrize("drop_rate", [0.0, 0.5, 0.875])
@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_the_warm_up_ends_soon_and_uses_only_masks_of_the_sampler(drop_rate: float, accumulation: int):
    upcoming = masks(0, drop_rate)
    one = warmup()
    chosen = run(one, upcoming, accumulation)
    assert 0 < len(chosen) <= MAX_FORWARDS
    assert set(chosen) <= set(upcoming)
    assert one.done and one.next(0, lambda: upcoming) is None


def test_no_later_variant_is_new():
    upcoming = masks(1)
    one = warmup()
    run(one, upcoming)
    seen = set(one.seen)
    one.done = False
    for dropped in upcoming:
        one.note(dropped, 0)
    assert one.seen == seen


def test_blocks_of_one_kind_share_and_others_do_not():
    same, others = warmup(), warmup([Layer(i, layer.branches) for i, layer in enumerate(LAYERS)])
    for one in (same, others):
        run(one, masks(2))
    assert len(others.seen) > 2 * len(same.seen)


def test_a_single_mask_needs_only_the_second_step():
    """The first training of a branch makes its moments; from the second on nothing is new."""
    assert run(warmup(), [0b1010_1010] * 400) == [0b1010_1010] * 2


def masks_of_a_run(stop: int | None = None, **options: object) -> tuple[list[tuple[bool, ...]], float]:
    """The masks of a run of known length, and its realised drop rate; broken off and resumed after `stop` forwards."""
    steps = 24
    model = tiny_llama(4)
    handle = dropbp.enable(model, 0.5, steps=steps, **options)
    found = []
    for step in range(steps):
        if step == stop:
            state = handle.state_dict()
            handle.remove()
            handle = dropbp.enable(model, 0.5, steps=steps, **options)
            handle.load_state_dict(state)
        llama_loss(model).backward()
        model.zero_grad()
        found.append(handle.mask)
    return found, handle.report()["realised_drop_rate"]


@pytest.mark.parametrize("stop", [None, 3, 20])
def test_a_run_of_known_length_compensates_for_masks_taken_in_advance(stop: int | None):
    expected, rate = masks_of_a_run()
    found, rate_warmed = masks_of_a_run(stop, rehearse=True)
    assert found != expected
    assert set(found) <= set(expected)
    assert rate == pytest.approx(0.5, abs=0.02)
    assert rate_warmed == pytest.approx(0.5, abs=0.02)
