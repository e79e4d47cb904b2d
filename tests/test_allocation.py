"""Allocation against its optimality conditions, a general convex solver, and the paper's greedy written literally."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, minimize

from dropbp.errors import ConfigError
from dropbp.masks.rates import METHODS, PROFILES, allocate, depth_rates
from tests.common.reference import ResidualNet, gradient_norm_sensitivities, greedy_rates

EPS = 1e-9

flops_values = st.floats(1e-3, 1e15)
sensitivity_values = st.one_of(st.floats(1e-12, 1e12), st.sampled_from([0.0, 1.0, 2.0]))
drop_rates = st.floats(0.0, 0.99)
branch_lists = st.lists(st.tuples(sensitivity_values, flops_values), min_size=1, max_size=24)
flops_lists = st.lists(flops_values, min_size=1, max_size=40)
methods = st.sampled_from(sorted(METHODS))
profiles = st.sampled_from(sorted(PROFILES))


def saved_share(rates, flops):
    largest = max(flops)
    return math.fsum(r * f / largest for r, f in zip(rates, flops, strict=True)) / math.fsum(f / largest for f in flops)


def objective(sensitivities, rates):
    return sum(s * p * p for s, p in zip(sensitivities, rates, strict=True))


@given(branch_lists, drop_rates, methods)
def test_rates_keep_the_budget_and_the_bounds(branches, drop_rate, method):
    sensitivities, flops = zip(*branches, strict=True)
    rates = allocate(sensitivities, flops, drop_rate, method=method)
    assert saved_share(rates, flops) == pytest.approx(drop_rate, abs=EPS)
    assert all(0 <= rate <= max(0.9, (1 + drop_rate) / 2) for rate in rates)


@given(branch_lists, drop_rates, st.floats(0.05, 1.0), methods)
def test_no_rate_exceeds_the_max_rate_given(branches, drop_rate, max_rate, method):
    assume(drop_rate <= max_rate)
    sensitivities, flops = zip(*branches, strict=True)
    rates = allocate(sensitivities, flops, drop_rate, max_rate, method=method)
    assert max(rates) <= max_rate
    assert saved_share(rates, flops) == pytest.approx(drop_rate, abs=EPS)


@given(branch_lists, drop_rates, methods, st.randoms(use_true_random=False))
def test_permuting_branches_permutes_rates_to_the_bit(branches, drop_rate, method, rng):
    order = list(range(len(branches)))
    rng.shuffle(order)
    rates = allocate(*zip(*branches, strict=True), drop_rate, method=method)
    permuted = allocate(*zip(*[branches[i] for i in order], strict=True), drop_rate, method=method)
    assert permuted == tuple(rates[i] for i in order)


@given(branch_lists, drop_rates, methods)
def test_more_sensitivity_per_flop_is_never_dropped_more(branches, drop_rate, method):
    sensitivities, flops = zip(*branches, strict=True)
    largest = math.fsum(flops)
    rates = allocate(sensitivities, flops, drop_rate, method=method)
    prices = [s / (f / largest) for s, f in branches]
    ordered = [rate for _, rate in sorted(zip(prices, rates, strict=True), key=lambda pair: (pair[0], -pair[1]))]
    assert all(a >= b - EPS for a, b in pairwise(ordered))


@given(branch_lists, drop_rates, drop_rates)
def test_a_higher_drop_rate_lowers_no_rate(branches, first, second):
    sensitivities, flops = zip(*branches, strict=True)
    lower = allocate(sensitivities, flops, min(first, second))
    higher = allocate(sensitivities, flops, max(first, second))
    assert all(a <= b + EPS for a, b in zip(lower, higher, strict=True))


@given(branch_lists, drop_rates, st.data())
def test_raising_one_sensitivity_does_not_raise_its_rate(branches, drop_rate, data):
    sensitivities, flops = zip(*branches, strict=True)
    place = data.draw(st.integers(0, len(branches) - 1))
    raised = [s * 3 + 1 if i == place else s for i, s in enumerate(sensitivities)]
    cap = max(0.9, (1 + drop_rate) / 2)
    before, after = (allocate(values, flops, drop_rate, cap)[place] for values in (sensitivities, raised))
    assert after <= before + EPS


@given(branch_lists, drop_rates)
def test_exact_is_a_stationary_point_of_the_objective(branches, drop_rate):
    """Between any two branches no exchange of equal FLOPs lowers the objective (KKT of a convex problem)."""
    sensitivities, flops = zip(*branches, strict=True)
    cap = max(0.9, (1 + drop_rate) / 2)
    rates = allocate(sensitivities, flops, drop_rate, cap)
    slopes = [s / f * p for s, f, p in zip(sensitivities, flops, rates, strict=True)]
    lowered_gain = max((x for x, p in zip(slopes, rates, strict=True) if p > EPS), default=0.0)
    raised_cost = min((x for x, p in zip(slopes, rates, strict=True) if p < cap - EPS), default=math.inf)
    assert lowered_gain <= raised_cost * (1 + 1e-6) + 1e-300


@pytest.mark.parametrize("seed", range(25))
def test_exact_equals_a_convex_solver(seed):
    rng = random.Random(seed)
    count = rng.randrange(2, 20)
    sensitivities = [rng.lognormvariate(0, 1.2) for _ in range(count)]
    flops = [rng.uniform(0.5, 4.0) for _ in range(count)]
    drop_rate, cap = rng.uniform(0.05, 0.85), 0.9
    budget = drop_rate * sum(flops)
    solved = minimize(
        lambda p: objective(sensitivities, p),
        x0=[drop_rate] * count,
        jac=lambda p: [2 * s * x for s, x in zip(sensitivities, p, strict=True)],
        bounds=[(0, cap)] * count,
        constraints=LinearConstraint([flops], budget, budget),
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    rates = allocate(sensitivities, flops, drop_rate, cap)
    assert rates == pytest.approx(list(solved.x), abs=1e-6)
    assert objective(sensitivities, rates) <= objective(sensitivities, solved.x) * (1 + 1e-6)


@pytest.mark.parametrize("method", ["paper", "uniform"])
@pytest.mark.parametrize("seed", range(5))
def test_exact_is_at_least_as_good_as_the_other_methods(seed, method):
    rng = random.Random(seed)
    sensitivities = [rng.lognormvariate(0, 2) for _ in range(64)]
    flops = [1.0, 2.0] * 32
    best, other = (objective(sensitivities, allocate(sensitivities, flops, 0.5, method=m)) for m in ("exact", method))
    assert best <= other * (1 + EPS)


def test_free_branches_are_filled_first_and_alike():
    assert allocate([0, 1, 0, 1], [1, 1, 3, 1], 0.4) == pytest.approx([0.6, 0, 0.6, 0])
    assert allocate([0, 1, 0, 1], [1, 1, 1, 1], 0.6) == pytest.approx([0.9, 0.3, 0.9, 0.3])


def test_infinitely_sensitive_branches_are_never_dropped():
    for method in ("exact", "paper"):
        assert allocate([math.inf, 1, 1], [1, 1, 1], 0.4, method=method) == pytest.approx([0, 0.6, 0.6])


def test_nothing_to_drop_is_nothing_dropped():
    assert allocate([math.inf, math.inf], [1, 2], 0.0) == (0, 0)
    assert allocate([3, 4], [1, 2], 0.0, method="paper") == (0, 0)


def test_all_free_is_uniform():
    assert allocate([0, 0, 0], [1, 5, 2], 0.7) == pytest.approx([0.7] * 3)


def test_extreme_magnitudes_keep_the_budget():
    sensitivities, flops = [5e-324, 1e308, 1e-300, 1.0, 0.0], [1e15, 1.0, 1e300, 7.0, 1e-10]
    assert saved_share(allocate(sensitivities, flops, 0.5), flops) == pytest.approx(0.5, abs=EPS)


def test_default_cap_is_the_papers_and_leaves_room_at_high_rates():
    assert max(allocate([1, 1e6, 1e6], [1, 1, 1], 0.5)) == 0.9
    assert max(allocate([1, 1e6, 1e6], [1, 1, 1], 0.9)) == 0.95
    assert min(allocate([1, 1e6, 1e6, 1], [1, 1, 1, 1], 0.95)) < 0.95


def test_tensors_are_taken_as_they_are():
    assert allocate(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]), 0.3) == allocate([1, 2], [1, 1], 0.3)


@pytest.mark.parametrize("drop_rate", [0.05, 0.3, 0.5, 0.72, 0.875])
def test_paper_method_is_the_papers_greedy_but_for_the_overshoot(drop_rate):
    rng = random.Random(7)
    sensitivities = [rng.lognormvariate(0, 1) for _ in range(32)]
    literal = greedy_rates(sensitivities, [1.0] * 32, drop_rate)
    mended = allocate(sensitivities, [1.0] * 32, drop_rate, 0.9, method="paper")
    different = [(a, b) for a, b in zip(literal, mended, strict=True) if abs(a - b) > EPS]
    assert len(different) <= 1
    assert all(0 <= a - b <= 0.1 + EPS for a, b in different)


def test_paper_method_meets_targets_where_the_papers_queue_runs_empty():
    with pytest.raises(ValueError, match="queue is empty"):
        greedy_rates([1.0, 2.0], [1.0, 1.0], 0.95)
    assert max(allocate([1.0, 2.0], [1.0, 1.0], 0.95, method="paper")) <= 0.975


def test_paper_method_weighs_what_a_step_saves():
    assert allocate([1.0, 1.0], [1.0, 100.0], 0.5, method="paper")[0] < 0.1


def test_allocation_from_the_papers_sensitivities_spares_the_most_sensitive_branch():
    net, x_BD = ResidualNet(), torch.linspace(-1, 1, 32).reshape(4, 8)
    sensitivities = gradient_norm_sensitivities(net, lambda mask: net(x_BD, mask).square().mean(), 4)
    rates = allocate(sensitivities, [1] * 4, 0.5)
    assert min(sensitivities) > 0
    assert rates.index(min(rates)) == sensitivities.index(max(sensitivities))


def test_reference_forward_is_the_same_for_every_mask():
    net, x_BD = ResidualNet(), torch.linspace(-1, 1, 32).reshape(4, 8)
    outputs = [net(x_BD, mask) for mask in ([], [True] * 4, [False, True, True, False])]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([math.nan, 1], [1, 1], 0.5), r"sensitivities\[0\] is nan; allowed is zero, a positive number, or infinity"),
        (([1, -2], [1, 1], 0.5), r"sensitivities\[1\] is -2.0"),
        (([1, "x"], [1, 1], 0.5), r"sensitivities\[1\] is 'x'; sensitivities needs one number per branch"),
        (([1, 1], [1, 0], 0.5), r"flops\[1\] is 0.0; allowed is a positive, finite number"),
        (([1, 1], [1, math.inf], 0.5), r"flops\[1\] is inf"),
        (([], [], 0.5), "flops is empty"),
        (([1], [1, 1], 0.5), "sensitivities has 1 entries and flops has 2"),
        (([1, 1], [1, 1], 1.0), "drop_rate is 1.0; allowed is a share of the FLOPs from 0 to below 1"),
        (([1, 1], [1, 1], math.nan), "drop_rate is nan"),
        (([1, 1], [1, 1], None), "drop_rate is None"),
        (([1, 1], [1, 1], 0.5, 0.0), "max_rate is 0.0; allowed is a rate above 0 and up to 1"),
        (([1, 1], [1, 1], 0.5, 0.4), "largest reachable drop rate is 0.4. Lower drop_rate, raise max_rate"),
        (([math.inf, 1], [3, 1], 0.5), "largest reachable drop rate is 0.225"),
    ],
)
def test_allocate_says_what_is_wrong(arguments, message):
    with pytest.raises(ConfigError, match=message):
        allocate(*arguments)


def test_unknown_method_and_profile_list_the_known_ones():
    with pytest.raises(ConfigError, match="method 'greedy' is unknown; known are exact, paper, uniform"):
        allocate([1], [1], 0.5, method="greedy")
    with pytest.raises(ConfigError, match="profile 'steep' is unknown; known are band, freeze, geometric"):
        depth_rates([1], 0.5, "steep")


@given(flops_lists, st.floats(1e-9, 0.999), profiles)
def test_depth_rates_rise_toward_the_input_and_keep_the_budget(flops, drop_rate, profile):
    rates = depth_rates(flops, drop_rate, profile)
    assert saved_share(rates, flops) == pytest.approx(drop_rate, rel=1e-12, abs=0)
    assert list(rates) == sorted(rates, reverse=True)
    assert all(0 <= rate <= 1 for rate in rates)


@pytest.mark.parametrize("profile", sorted(PROFILES))
@pytest.mark.parametrize("drop_rate", [1e-12, 1e-7, 1 - 1e-9])
def test_depth_rates_keep_a_tiny_budget_as_exactly(profile, drop_rate):
    flops = [1.0, 2.0] * 20
    assert saved_share(depth_rates(flops, drop_rate, profile), flops) == pytest.approx(drop_rate, rel=1e-12, abs=0)


@given(flops_lists, st.floats(0.0, 0.95), st.floats(0.0, 0.95), profiles)
def test_a_higher_drop_rate_lowers_no_depth_rate(flops, first, second, profile):
    lower, higher = (depth_rates(flops, p, profile) for p in sorted((first, second)))
    assert all(a <= b + EPS for a, b in zip(lower, higher, strict=True))


@given(flops_lists, st.floats(0.01, 0.8), profiles)
def test_depth_rates_stay_below_the_max_rate(flops, drop_rate, profile):
    rates = depth_rates(flops, drop_rate, profile, max_rate=0.8)
    assert max(rates) <= 0.8
    assert saved_share(rates, flops) == pytest.approx(drop_rate, rel=1e-12)


def test_geometric_depth_has_a_constant_ratio_and_trains_the_top_always():
    keeps = [1 - rate for rate in reversed(depth_rates([1] * 16, 0.8, "geometric"))]
    ratios = [b / a for a, b in pairwise(keeps)]
    assert keeps[0] == 1
    assert ratios == pytest.approx([ratios[0]] * 15, rel=1e-9)


def test_freeze_is_one_below_zero_above_and_fractional_at_the_border():
    assert depth_rates([1, 2] * 4, 0.5, "freeze") == (1, 1, 1, 1, 0, 0, 0, 0)
    assert depth_rates([1] * 4, 0.6, "freeze") == pytest.approx([1, 1, 0.4, 0])


def test_shelf_always_trains_a_top_and_goes_deeper_with_a_constant_ratio():
    keeps = [1 - rate for rate in reversed(depth_rates([1] * 64, 0.75, "shelf"))]
    shelf = sum(keep == 1 for keep in keeps)
    ratios = [b / a for a, b in pairwise(keeps[shelf:30])]
    assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-6)
    assert sum(keeps) == pytest.approx(16)
    assert shelf == pytest.approx(0.75 * 16, abs=1)
    assert sum(keeps[shelf:]) == pytest.approx(0.25 * 16, abs=1)


def test_shelf_trains_every_branch_now_and_then():
    assert all(rate < 1 for rate in depth_rates([1, 2] * 8, 0.5, "shelf"))


def test_uniform_depth_spreads_evenly_over_a_range():
    assert depth_rates([1] * 4, 0.5, "uniform_depth") == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert depth_rates([1] * 4, 0.125, "uniform_depth") == pytest.approx([1 / 2, 0, 0, 0])


def test_linear_rates_lie_on_a_line():
    assert depth_rates([1] * 5, 0.25, "linear") == pytest.approx([0.5, 0.375, 0.25, 0.125, 0])
    assert depth_rates([1] * 5, 0.75, "linear") == pytest.approx([1, 0.875, 0.75, 0.625, 0.5])


@pytest.mark.parametrize("profile", ["geometric", "uniform_depth", "freeze", "shelf"])
def test_budget_below_the_top_branch_trains_only_that_branch(profile):
    assert depth_rates([1] * 4, 0.9, profile) == pytest.approx([1, 1, 1, 0.6])


def test_depth_rates_say_what_can_be_reached():
    with pytest.raises(ConfigError, match=r"largest reachable drop rate is 0\.5"):
        depth_rates([1, 1], 0.6, max_rate=0.5)
