"""The budget of annealed runs: whatever forwards come, the target share is dropped, or a warning says so."""

from __future__ import annotations

import copy
import json
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dropbp.config import make_config
from dropbp.errors import ConfigError, StateError
from dropbp.flops import FlopsModel, Shape
from dropbp.lazy.warmup import GraphWarmup, Layer
from dropbp.masks import sampler_kinds
from dropbp.masks.budget import TOLERANCE, shortfall
from dropbp.masks.pace import Curve
from dropbp.masks.plan import Conditions
from dropbp.masks.schedule import Schedule

BRANCHES = 24
FLOPS = FlopsModel(({"s": 2.0, "ss": 0.01}, {"s": 3.0}) * (BRANCHES // 2))
ALONE = Conditions()
DROP_RATES = st.sampled_from([0.25, 0.5, 0.75, 0.875])
MASKS = st.sampled_from(sorted(sampler_kinds()))


def schedule(drop_rate: float = 0.5, masks: str = "nested", **options) -> Schedule:
    extra = {name: options.pop(name) for name in ("weights", "trains") if name in options}
    known = {name: entry.options for name, entry in sampler_kinds().items()}
    config = make_config(drop_rate, masks, options.pop("seed", 0), options, known)
    names = [f"branch {i}" for i in range(BRANCHES)]
    blocks = [3 << i for i in range(0, BRANCHES, 2)]
    return Schedule(config, names, blocks, FLOPS, Shape(2, 32), **extra)


class Alive:
    """The FLOPs of some branches; the others have no backward."""

    def __init__(self, dead: set[int]) -> None:
        self.dead = dead

    def at(self, shape: Shape) -> tuple[int, ...]:
        return tuple(0 if i in self.dead else f for i, f in enumerate(FLOPS.at(shape)))


class Run:
    """Counts what a schedule drops, independently of its own statistics."""

    def __init__(self, one: Schedule) -> None:
        self.one, self.dropped, self.seen, self.masks = one, 0.0, 0.0, []

    def forward(self, length: int = 32, conditions: Conditions = ALONE) -> None:
        plan = self.one.next(Shape(2, length), conditions)
        flops = FLOPS.at(Shape(2, length))
        self.dropped += sum(f for i, f in enumerate(flops) if plan.dropped >> i & 1)
        self.seen += sum(flops)
        self.masks.append(self.one.mask)

    def replaced(self, one: Schedule) -> None:
        """Another process continues from the saved state."""
        one.load(json.loads(json.dumps(self.one.state())))
        self.one = one

    @property
    def rate(self) -> float:
        return self.dropped / self.seen

    def assert_on_target(self, target: float) -> None:
        assert self.one.statistics.drop_rate == pytest.approx(self.rate)
        assert abs(self.rate - target) <= TOLERANCE + 1e-9 or shortfall(self.one) is not None


@settings(max_examples=50)
@given(DROP_RATES, st.integers(1, 300), st.sampled_from(["forward", 3]))
@example(0.875, 238, 3)
def test_a_run_of_known_length_trains_deepest_first_and_meets_its_budget(drop_rate, steps, resample):
    run = Run(schedule(drop_rate, steps=steps, resample=resample))
    for _ in range(steps):
        run.forward()
    kept = [mask.count(False) for mask in run.masks]
    assert kept == sorted(kept, reverse=True)
    run.assert_on_target(drop_rate)
    if steps >= 60:
        assert run.rate == pytest.approx(drop_rate, abs=TOLERANCE)


@pytest.mark.parametrize("drop_rate", [0.4, 0.5])
@pytest.mark.parametrize("burst", [0, 15, 29])
@pytest.mark.parametrize("forwards", [(4, 3), (6, 3)])
def test_a_step_of_many_forwards_does_not_move_the_budget(drop_rate, burst, forwards):
    for foreseen in (1, 30, 400):
        run = Run(schedule(drop_rate, steps=foreseen))
        told(run, [forwards if place == burst else (1, 1) for place in range(30)])
        assert run.rate == pytest.approx(drop_rate, abs=TOLERANCE)


def test_steps_of_many_forwards_in_a_row_do_not_move_the_budget():
    for foreseen in (1, 30, 400):
        run = Run(schedule(0.5, steps=foreseen))
        told(run, [(1, 1)] * 8 + [(4, 3), (4, 3), (1, 3), (4, 3), (2, 2)] + [(1, 1)] * 17)
        assert run.rate == pytest.approx(0.5, abs=TOLERANCE)


def told(run, steps):
    """Micro-batches of each step and forwards of each micro-batch, and the progress told before each micro-batch."""
    for place, (micro_batches, forwards) in enumerate(steps):
        for micro_batch in range(micro_batches):
            run.one.progress((place + micro_batch / micro_batches) / len(steps), True)
            for _ in range(forwards):
                run.forward()


@settings(max_examples=60)
@given(
    DROP_RATES,
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 3)), min_size=30, max_size=120),
    st.integers(1, 400),
    st.data(),
)
def test_a_trainer_that_reports_its_progress_meets_the_budget(drop_rate, steps, foreseen, data):
    """Micro-batches of each step and forwards of each micro-batch as they come; the hint may be wrong by any factor."""
    run = Run(schedule(drop_rate, steps=foreseen))
    stop = data.draw(st.none() | st.integers(0, len(steps) - 1))
    resume = data.draw(st.none() | st.integers(0, len(steps) - 1))
    for place, (micro_batches, forwards) in enumerate(steps):
        if place == stop:
            break
        if place == resume:
            run.replaced(schedule(drop_rate, steps=data.draw(st.integers(1, 400))))
        for micro_batch in range(micro_batches):
            run.one.progress((place + micro_batch / micro_batches) / len(steps), True)
            for _ in range(forwards):
                run.forward()
    if run.seen:
        run.assert_on_target(drop_rate)
        if stop is None:
            assert run.rate == pytest.approx(drop_rate, abs=TOLERANCE)


@settings(max_examples=30)
@given(DROP_RATES, st.integers(60, 200), st.sampled_from([0.25, 0.5, 1.5, 2.0, 4.0]), st.data())
def test_a_custom_loop_meets_the_budget_or_says_that_it_ended_early(drop_rate, steps, times, data):
    """Longer than `steps`: it continues at the target rate, not at the last mask."""
    run = Run(schedule(drop_rate, steps=steps))
    resume, other = data.draw(st.integers(0, 50)), data.draw(st.sampled_from([0.5, 1, 2]))
    for place in range(int(steps * times)):
        if place == resume:
            run.replaced(schedule(drop_rate, steps=int(steps * other)))
        run.forward()
    run.assert_on_target(drop_rate)
    if times >= 1.5 and other <= 1:
        assert run.rate == pytest.approx(drop_rate, abs=TOLERANCE)
        assert len(set(run.masks[int(steps * 1.1) :])) > 1


@settings(max_examples=30)
@given(
    DROP_RATES,
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.integers(80, 300),
    st.sampled_from([1.0, 2.0, 4.0, 16.0]),
)
def test_lengths_that_drift_or_jump_are_compensated(drop_rate, lengths, steps, growth):
    run = Run(schedule(drop_rate, steps=steps))
    for place in range(steps):
        run.forward(int(8 + lengths[place % len(lengths)] * (1 + growth * place / steps)))
    run.assert_on_target(drop_rate)
    assert run.rate == pytest.approx(drop_rate, abs=0.03)


def test_lengths_that_fall_to_a_fraction_are_reported():
    run = Run(schedule(0.5, steps=200))
    for place in range(200):
        run.forward(1000 - 4 * place)
    run.assert_on_target(0.5)


@settings(max_examples=30)
@given(DROP_RATES, MASKS, st.booleans(), st.integers(0, 60), st.integers(0, 2))
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(drop_rate, masks, told, stop, seed):
    whole, parts = (Run(schedule(drop_rate, masks, steps=64, seed=seed)) for _ in range(2))
    for place in range(64):
        if place == stop:
            parts.replaced(schedule(drop_rate, masks, steps=64, seed=seed))
        for run in (whole, parts):
            if told:
                run.one.progress(place / 64, place > 3)
            for _ in range(1 + place % 2):
                run.forward(16 + 5 * place % 48)
    assert whole.masks == parts.masks
    assert whole.one.state() == parts.one.state()


@settings(max_examples=30)
@given(DROP_RATES, MASKS, st.lists(st.integers(1, 400), min_size=16, max_size=64))
def test_ranks_that_see_different_lengths_draw_the_same_masks(drop_rate, masks, lengths):
    one, other = (Run(schedule(drop_rate, masks, steps=len(lengths))) for _ in range(2))
    ranks = Conditions(multi_rank=True)
    for length in lengths:
        one.forward(length, ranks)
        other.forward(401 - length, ranks)
    assert one.masks == other.masks
    assert one.one.state()["pace"] == other.one.state()["pace"]


# -- what may change over a resume


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.875), (0.875, 0.5), (0.5, 0.0)])
@pytest.mark.parametrize("masks", ["nested", "exact"])
@pytest.mark.parametrize("stop", [60, 150])
def test_a_new_drop_rate_holds_for_the_rest_of_the_run(before, after, masks, stop, caplog):
    run = Run(schedule(before, masks, steps=300))
    for _ in range(stop):
        run.forward()
    run.replaced(schedule(after, masks, steps=300))
    assert "a different drop_rate" in caplog.text
    rest = Run(run.one)
    for _ in range(300 - stop):
        rest.forward()
    assert rest.rate == pytest.approx(after, abs=TOLERANCE)
    assert sum(rest.one.at(Shape(2, 32)).rates) > 0 or after == 0


@pytest.mark.parametrize("factor", [0.5, 2, 4])
def test_another_accumulation_does_not_change_the_rest_of_the_run(factor):
    """The same training in more, or fewer, forwards: `steps` is another number and half of it is still to come."""
    run = Run(schedule(0.5, steps=200))
    for _ in range(100):
        run.forward()
    run.replaced(schedule(0.5, steps=int(200 * factor)))
    rest = Run(run.one)
    for _ in range(int(100 * factor)):
        rest.forward()
    assert len(set(rest.masks)) > (3 if factor > 1 else 1)
    assert shortfall(run.one) is None


@pytest.mark.parametrize("masks", ["nested", "independent"])
@pytest.mark.parametrize("steps", [None, 200])
def test_a_budget_missed_because_masks_left_nothing_to_train_says_so(masks, steps):
    upper = (1 << BRANCHES) - (1 << BRANCHES // 2)

    def trains(dropped):  # only what lies in the upper half is trained, and a little of it
        return dropped & upper != upper and (dropped & upper).bit_count() <= 3

    run = Run(schedule(0.75, masks=masks, steps=steps, trains=trains))
    for _ in range(200):
        run.forward()
    assert "nothing to train" in shortfall(run.one) and "come closer" not in shortfall(run.one)


def test_a_budget_missed_because_of_few_draws_says_so():
    run = Run(schedule(0.5, masks="independent", seed=3))
    for _ in range(3):
        run.forward()
    assert "3 masks were drawn" in (shortfall(run.one) or "")


@pytest.mark.parametrize(
    "change", [{"warmup": 80}, {"resample": "step"}, {"resample": 4}, {"steps": None}, {"max_rate": 0.9}]
)
def test_other_options_may_change(change, caplog):
    run = Run(schedule(0.5, steps=200))
    for _ in range(60):
        run.forward()
    run.replaced(schedule(0.5, **{"steps": 200, **change}))
    assert f"a different {next(iter(change))}" in caplog.text
    for place in range(140):
        if place % 2:
            run.one.resample()
        run.forward()
    assert abs(run.rate - 0.5) <= TOLERANCE or shortfall(run.one)
    if "warmup" in change:
        assert not any(any(mask) for mask in run.masks[60:80])


@pytest.mark.parametrize(("change", "named"), [({"seed": 1}, "seed"), ({"masks": "exact"}, "masks")])
def test_options_that_must_not_change_are_refused_by_name(change, named):
    state = schedule(0.5, steps=50).state()
    with pytest.raises(StateError, match=f"its {named} are"):
        schedule(0.5, **{"steps": 50, **change}).load(state)


def test_a_run_that_begins_late_anneals_over_the_rest():
    """A checkpoint was written without DropBP."""
    run = Run(schedule(0.5, steps=200))
    for place in range(80, 200):
        run.one.progress(place / 200, True)
        run.forward()
    assert run.rate == pytest.approx(0.5, abs=TOLERANCE)


# -- branches without a backward, and masks that train nothing


@settings(max_examples=60)
@given(DROP_RATES, MASKS, st.sets(st.integers(0, BRANCHES - 1), max_size=12), st.booleans())
def test_branches_without_a_backward_are_no_part_of_the_budget(drop_rate, masks, dead, known):
    one = schedule(drop_rate, masks, weights=Alive(dead), steps=300 if known else None)
    flops, dropped = Alive(dead).at(Shape(2, 32)), 0
    for _ in range(300):
        one.next(Shape(2, 32), ALONE)
        dropped += sum(f for f, drop in zip(flops, one.mask, strict=True) if drop)
        assert not any(one.mask[i] for i in dead)
    assert all(one.rates[i] == 0 for i in dead)
    assert one.statistics.drop_rate == pytest.approx(dropped / (300 * sum(flops)))
    assert abs(one.statistics.drop_rate - drop_rate) <= TOLERANCE or shortfall(one)


def test_a_model_without_any_backward_in_its_branches_drops_nothing_and_says_so(caplog):
    one = schedule(0.5, weights=Alive(set(range(BRANCHES))))
    assert "No branch has a backward" in caplog.text
    assert one.next(Shape(2, 32), ALONE).dropped == 0
    assert shortfall(one) is None


@settings(max_examples=30)
@given(
    st.sampled_from([0.5, 0.875, 0.95]),
    MASKS,
    st.sets(st.integers(0, BRANCHES - 1), min_size=1, max_size=8),
    st.booleans(),
)
def test_every_drawn_mask_trains_something(drop_rate, masks, trained, known):
    """Adapters on some branches only: a mask that drops them all would leave no gradient at all."""
    options = {"steps": 200} if known else {}

    def trains(dropped: int) -> bool:
        return any(not dropped >> i & 1 for i in trained)

    plain = schedule(drop_rate, masks, **options)
    if all(plain.rates[i] == 1 for i in trained):
        with pytest.raises(ConfigError, match="nothing would train"):
            schedule(drop_rate, masks, trains=trains, **options)
        return
    one, twin = (schedule(drop_rate, masks, trains=trains, **options) for _ in range(2))
    for _ in range(200):
        assert trains(one.next(Shape(2, 32), ALONE).dropped)
        twin.next(Shape(2, 32), ALONE)
        assert one.mask == twin.mask
    assert abs(one.statistics.drop_rate - drop_rate) <= TOLERANCE or shortfall(one)


def test_a_redrawn_mask_changes_rates_no_more_than_it_must():
    """Half of the branches are trained: all of them are dropped together once in 2000 draws at most."""
    rates = [0.0] * BRANCHES
    one = schedule(0.5, "independent", trains=lambda dropped: dropped & 0xFFF != 0xFFF)
    for _ in range(2000):
        one.next(Shape(2, 32), ALONE)
        rates = [rate + drop / 2000 for rate, drop in zip(rates, one.mask, strict=True)]
    assert all(rate == pytest.approx(0.5, abs=0.05) for rate in rates)


def test_masks_of_a_graph_warm_up_also_train_something():
    one = schedule(0.875, "independent", trains=lambda dropped: dropped & 0b11 != 0b11)
    layers = [Layer("block", 3 << i) for i in range(0, BRANCHES, 2)]
    one.graph_warmup = GraphWarmup(layers, (1 << BRANCHES) - 1, lambda _: 0)
    for _ in range(100):
        assert one.next(Shape(2, 32), ALONE).dropped & 0b11 != 0b11


# -- the curve


@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12), st.floats(-0.5, 1.5), st.integers(1, 50))
@example([1 - 2**-53], 0.25, 1)
def test_the_rest_of_a_run_has_the_wanted_mean(rates, wanted, left):
    edges = sorted({0.0, *rates} - {1.0})
    dropped = [sum(rate > edge for rate in rates) / len(rates) for edge in edges]
    curve = Curve(edges, dropped)
    low, high = (0.0, curve._end(wanted)) if wanted >= curve.mean else (curve._start(wanted), 1.0)
    assert 0 <= low <= high <= 1
    assert low <= curve.number(wanted, left) <= high
    if dropped[-1] + 1e-6 < wanted < dropped[0] - 1e-6:
        if low == high:  # no number between them is a double
            assert low >= 1 - sys.float_info.epsilon
            return
        mean = _between(curve, low, high) / (high - low)
        ends = sys.float_info.epsilon / (high - low)  # which are rounded to doubles
        assert mean == pytest.approx(wanted, abs=1e-6 + ends)


def _between(curve: Curve, low: float, high: float) -> float:
    pieces = zip(curve.dropped, curve.edges[:-1], curve.edges[1:], strict=True)
    return sum(share * max(0.0, min(end, high) - max(start, low)) for share, start, end in pieces)


def test_a_state_is_not_shared_with_the_schedule_that_wrote_it():
    one = schedule(0.5, steps=50)
    state = one.state()
    before = copy.deepcopy(state)
    one.next(Shape(2, 32), ALONE)
    assert state == before
