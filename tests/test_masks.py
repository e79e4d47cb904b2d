"""Each sampler keeps its promise: exact marginals, its budget, purity in (seed, step), and no global state touched.

Statistical tests have fixed seeds, so they pass or fail for good; the error they allow is 4 standard deviations.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import subprocess
import sys
from fractions import Fraction
from itertools import combinations, compress

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dropbp.errors import ConfigError
from dropbp.masks import Draws, Sampler, register_sampler, registry, sampler_kinds
from dropbp.masks import samplers as masks
from dropbp.masks.rates import PROFILES, allocate, depth_rates
from tests.common.reference import independent_mask

ALL = ["cyclic", "exact", "independent", "nested", "pool"]
MIXED_RATES = (0.0, 1.0, 0.5, 0.25, 0.9, 0.05, 0.61, 0.61, 0.61, 0.999, 0.125, 0.7)
MIXED_FLOPS = (3.0, 1.0, 2.0, 2.0, 2.0, 7.5, 1.0, 1.0, 4.0, 1.0, 2.0, 0.3)

rates_and_flops = st.lists(
    st.tuples(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.875, 1.0])), st.sampled_from([1.0, 2.0, 3.7])),
    min_size=1,
    max_size=40,
).map(lambda pairs: tuple(zip(*pairs, strict=True)))
seeds = st.integers(-(2**70), 2**70)
steps = st.integers(0, 2**40)


def transformer(drop_rate, blocks=32):
    """Rates from sensitivities for a model of attention and MLP branches."""
    rng, flops = random.Random(5), [1.0, 2.0] * blocks
    return allocate([rng.lognormvariate(0, 1) for _ in flops], flops, drop_rate), flops


def assert_marginals(frequencies, rates, draws):
    for frequency, rate in zip(frequencies, rates, strict=True):
        assert abs(frequency - rate) <= 4 * math.sqrt(rate * (1 - rate) / draws) + 1e-12


def realised_rate(mask, flops):
    return sum(compress(flops, mask)) / sum(flops)


def frequencies(drawn):
    return [sum(column) / len(drawn) for column in zip(*drawn, strict=True)]


def test_the_samplers_are_registered_and_say_what_they_do():
    assert list(sampler_kinds()) == ALL
    assert all(entry.summary for entry in sampler_kinds().values())
    assert sampler_kinds()["pool"].options == ("pool_size", "pool_of")


@pytest.mark.parametrize(
    ("how", "options"),
    [(name, {}) for name in ALL]
    + [("nested", {"uniform": "random"}), ("pool", {"pool_size": 5}), ("pool", {"pool_of": "exact"})],
)
@pytest.mark.parametrize("step", [0, 977])
def test_every_branch_has_its_rate_over_seeds(how, options, step):
    count = 2500
    drawn = [Sampler(how, MIXED_RATES, MIXED_FLOPS, seed, **options).draw(step) for seed in range(count)]
    assert_marginals(frequencies(drawn), MIXED_RATES, count)


@pytest.mark.parametrize("how", ["cyclic", "exact", "independent", "nested"])
def test_every_branch_has_its_rate_over_steps(how):
    count, sampler = 4000, Sampler(how, MIXED_RATES, MIXED_FLOPS, 3)
    assert_marginals(frequencies([sampler.draw(step) for step in range(count)]), MIXED_RATES, count)


@pytest.mark.parametrize("how", ["cyclic", "exact", "nested", "pool"])
@pytest.mark.parametrize("drop_rate", [0.3, 0.5, 0.75, 0.875])
@pytest.mark.parametrize("kind", ["uniform", "sensitivity"])
def test_mean_share_over_400_steps_is_within_half_a_percent(how, drop_rate, kind):
    rates, flops = transformer(drop_rate)
    sampler = Sampler(how, rates if kind == "sensitivity" else [drop_rate] * len(flops), flops, 1)
    mean = sum(realised_rate(sampler.draw(step), flops) for step in range(400)) / 400
    assert mean == pytest.approx(drop_rate, rel=0.005)


def test_mean_share_of_independent_masks_is_the_rate_within_its_error():
    rates, flops = transformer(0.5)
    sampler, total = Sampler("independent", rates, flops, 1), sum(flops)
    mean = sum(realised_rate(sampler.draw(step), flops) for step in range(400)) / 400
    variance = sum((f / total) ** 2 * p * (1 - p) for f, p in zip(flops, rates, strict=True)) / 400
    assert abs(mean - 0.5) <= 4 * math.sqrt(variance)


@given(rates_and_flops, seeds, steps, st.sampled_from(ALL))
def test_rates_of_zero_and_one_hold_in_every_step(branches, seed, step, how):
    mask = Sampler(how, *branches, seed).draw(step)
    assert all(type(dropped) is bool for dropped in mask)
    for dropped, rate in zip(mask, branches[0], strict=True):
        assert dropped == bool(rate) or 0 < rate < 1


@given(rates_and_flops, seeds, steps)
def test_exact_keeps_every_step_within_one_branch_of_the_budget(branches, seed, step):
    rates, flops = branches
    sampler = Sampler("exact", rates, flops, seed)
    saved = realised_rate(sampler.draw(step), flops)
    assert abs(saved - sampler.drop_rate) * sum(flops) < max(flops) + 1e-9


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), seeds, steps)
def test_exact_with_equal_flops_rounds_the_number_of_dropped_branches(rates, seed, step):
    dropped = sum(Sampler("exact", rates, [3.0] * len(rates), seed).draw(step))
    assert math.floor(sum(rates) - 1e-9) <= dropped <= math.ceil(sum(rates) + 1e-9)


def test_exact_keeps_the_count_of_attention_and_of_mlp_branches():
    sampler = Sampler("exact", [0.5] * 64, [1.0, 2.0] * 32, 0)
    assert all(sum(sampler.draw(step)[::2]) == sum(sampler.draw(step)[1::2]) == 16 for step in range(50))


def test_exact_masks_combine_any_two_branches_in_every_way():
    for flops in ([1.0] * 6, [1.0, 2.0] * 3, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]):
        sampler = Sampler("exact", [0.5] * 6, flops, 0)
        drawn = [sampler.draw(step) for step in range(300)]
        for first, second in combinations(range(6), 2):
            assert len({(mask[first], mask[second]) for mask in drawn}) == 4


def test_independent_flips_one_coin_per_branch_as_in_the_paper():
    sampler = Sampler("independent", MIXED_RATES, MIXED_FLOPS, 11)
    coins = masks._generator(11, "independent", 4)
    assert list(sampler.draw(4)) == independent_mask(MIXED_RATES, coins)


@given(
    st.one_of(st.floats(2**-11, 1), st.sampled_from([0.0, 0.1, 0.875, 0.9])),
    seeds,
    st.integers(0, 2**30),
    st.integers(1, 60),
)
def test_cyclic_drops_a_branch_equally_often_in_every_window(rate, seed, start, length):
    sampler = Sampler("cyclic", [rate, 0.3], [1.0, 2.0], seed)
    dropped, expected = sum(sampler.draw(start + t)[0] for t in range(length)), Fraction(rate) * length
    assert math.floor(expected) <= dropped <= math.ceil(expected)


@given(st.floats(0, 1), st.lists(st.sampled_from([1.0, 2.0, 3.7]), min_size=1, max_size=40), seeds, steps)
def test_cyclic_with_equal_rates_keeps_the_budget_within_one_branch(rate, flops, seed, step):
    saved = realised_rate(Sampler("cyclic", [rate] * len(flops), flops, seed).draw(step), flops)
    assert abs(saved - rate) * sum(flops) <= max(flops) + 1e-6


@given(rates_and_flops, seeds, st.sampled_from(["golden", "random"]))
def test_nested_drops_every_branch_above_one_number(branches, seed, uniform):
    rates, flops = branches
    sampler = Sampler("nested", rates, flops, seed, uniform=uniform)
    for step in range(20):
        mask = sampler.draw(step)
        lowest_dropped = min((p for p, z in zip(rates, mask, strict=True) if z), default=2.0)
        assert all(p < lowest_dropped for p, z in zip(rates, mask, strict=True) if not z)
        assert mask in sampler.distinct_masks
    assert len(sampler.distinct_masks) <= len(rates) + 1


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_nested_with_rates_over_depth_trains_the_top_of_the_model(profile):
    flops = [1.0, 2.0] * 6
    sampler = Sampler("nested", depth_rates(flops, 0.6, profile), flops, 0)
    for step in range(100):
        assert list(sampler.draw(step)) == sorted(sampler.draw(step), reverse=True)


def test_nested_masks_are_all_reached_and_counted():
    sampler = Sampler("nested", (0.9, 0.6, 0.6, 0.2), (1, 1, 1, 1), 0)
    drawn = {sampler.draw(step) for step in range(200)}
    assert len(sampler.distinct_masks) == 4
    assert drawn == set(sampler.distinct_masks)
    assert Sampler("nested", (1.0, 0.0), (1, 1), 0).distinct_masks == ((True, False),)


def test_nested_golden_numbers_are_even_over_any_few_steps():
    for seed in range(50):
        sampler = Sampler("nested", [0.5], [1.0], seed)
        assert abs(sum(sampler.draw(100 * seed + t)[0] for t in range(16)) - 8) <= 1


@given(rates_and_flops, seeds, st.integers(1, 12))
def test_pool_is_balanced_over_masks_and_branches(branches, seed, size):
    rates, flops = branches
    sampler = Sampler("pool", rates, flops, seed, pool_size=size)
    drawn = [sampler.draw(step) for step in range(size)]
    for rate, column in zip(rates, zip(*drawn, strict=True), strict=True):
        assert math.floor(rate * size - 1e-9) <= sum(column) <= math.ceil(rate * size + 1e-9)
    for mask in drawn:
        assert abs(realised_rate(mask, flops) - sampler.drop_rate) * sum(flops) <= max(flops) + 1e-6


def test_pool_balances_flops_and_not_numbers():
    sampler = Sampler("pool", [0.5] * 9, [8.0] + [1.0] * 8, 0, pool_size=2)
    assert [realised_rate(mask, sampler.flops) for mask in sampler.distinct_masks] == [0.5, 0.5]


@pytest.mark.parametrize("pool_of", ["balanced", "exact", "independent", "cyclic", "nested"])
def test_pool_visits_each_mask_once_a_lap_in_changing_order(pool_of):
    sampler = Sampler("pool", *transformer(0.5), 2, pool_size=6, pool_of=pool_of)
    laps = [[sampler.draw(6 * lap + place) for place in range(6)] for lap in range(20)]
    assert all(sorted(lap) == sorted(laps[0]) for lap in laps)
    assert len({tuple(lap) for lap in laps}) > 10
    assert set(laps[0]) == set(sampler.distinct_masks)
    assert len(sampler.distinct_masks) == len(set(laps[0])) <= 6


def test_pool_trains_every_branch_where_its_size_allows():
    sampler = Sampler("pool", [0.875] * 64, [1.0, 2.0] * 32, 0)
    assert not any(all(column) for column in zip(*sampler.distinct_masks, strict=True))


def test_unbounded_samplers_list_no_masks():
    for how in ("cyclic", "exact", "independent"):
        sampler = Sampler(how, [0.5] * 4, [1.0] * 4, 0)
        assert sampler.distinct_masks is None


@given(rates_and_flops, seeds, st.lists(steps, min_size=1, max_size=5), st.sampled_from(ALL))
def test_a_draw_depends_on_seed_and_step_alone(branches, seed, asked, how):
    sampler = Sampler(how, *branches, seed)
    forward = [sampler.draw(step) for step in asked]
    assert [sampler.draw(step) for step in reversed(asked)] == forward[::-1]
    assert [Sampler(how, *branches, seed).draw(step) for step in asked] == forward


@pytest.mark.parametrize("how", ALL)
def test_copies_draw_the_same(how):
    sampler = Sampler(how, *transformer(0.5), 9)
    for twin in (pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)):
        assert [twin.draw(step) for step in range(10)] == [sampler.draw(step) for step in range(10)]
        assert repr(twin) == repr(sampler)


@pytest.mark.parametrize("how", ALL)
def test_another_seed_draws_other_masks(how):
    runs = {tuple(Sampler(how, *transformer(0.5), seed).draw(step) for step in range(8)) for seed in (-1, 0, 1, 2**65)}
    assert len(runs) == 4


PINNED = {
    "cyclic": ["1111101000", "1101010100", "1111101000"],
    "exact": ["1111011000", "1011000110", "1110011001"],
    "independent": ["1101010000", "1110011100", "1111010100"],
    "nested": ["0000000000", "1111000000", "0000000000"],
    "pool": ["1111101000", "1100010100", "1101010000"],
}


def as_text(how):
    sampler = Sampler(how, [0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1], [1.0, 2.0] * 5, 42)
    return ["".join(str(int(dropped)) for dropped in sampler.draw(step)) for step in (0, 1, 10**6)]


@pytest.mark.parametrize("how", ALL)
def test_masks_are_the_same_on_every_machine_and_version(how):
    """Pinned: a change here breaks every run that is resumed."""
    assert as_text(how) == PINNED[how]


def test_masks_do_not_depend_on_the_hash_seed_of_the_process():
    code = "from dropbp.masks import Sampler; print(Sampler('pool', [0.9, 0.5, 0.2, 0.5], [1, 2, 1, 2], 42).draw(5))"
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(Sampler("pool", [0.9, 0.5, 0.2, 0.5], [1, 2, 1, 2], 42).draw(5))


def global_states():
    numpy_state = np.random.get_state()[1]  # noqa: NPY002 - the global state is what is looked at
    return random.getstate(), torch.get_rng_state().tolist(), numpy_state.tolist()


@pytest.mark.parametrize("how", ALL)
def test_no_global_random_state_is_touched(how):
    before = global_states()
    sampler = Sampler(how, *transformer(0.5), 0)
    for step in range(20):
        sampler.draw(step)
    assert global_states() == before


@pytest.mark.parametrize("how", ALL)
def test_masks_do_not_follow_the_global_seed(how):
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        drawn.append(Sampler(how, *transformer(0.5), 0).draw(3))
    assert drawn[0] == drawn[1]


def test_a_custom_sampler_can_be_added(monkeypatch):
    monkeypatch.setattr(registry, "_SAMPLERS", dict(registry._SAMPLERS))

    @register_sampler("alternate")
    def alternate(rates, flops, seed, *, offset=0):
        """Every other branch in turn."""
        return Draws(lambda step: tuple((i + step + offset) % 2 == 0 for i in range(len(rates))))

    assert Sampler("alternate", [0.5] * 3, [1.0] * 3, offset=1).draw(0) == (False, True, False)
    assert sampler_kinds()["alternate"].summary == "Every other branch in turn."
    with pytest.raises(ConfigError, match="mask sampler 'alternate' is already registered; known are alternate"):
        register_sampler("alternate")(alternate)


def test_sampler_states_its_mean_drop_rate():
    sampler = Sampler("pool", [0.5, 0.2], [1.0, 2.0], 7, pool_size=4)
    assert sampler.drop_rate == pytest.approx(0.3)
    assert repr(sampler) == "Sampler('pool', 2 branches, drop_rate=0.3, seed=7, pool_size=4)"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("exact", [0.5, math.nan], [1, 1], 0), {}, r"rates\[1\] is nan; allowed is a number from 0 \(never dropped\)"),
        (("exact", [0.5, 1.01], [1, 1], 0), {}, r"rates\[1\] is 1.01"),
        (("exact", [-0.1], [1], 0), {}, r"rates\[0\] is -0.1"),
        (("exact", [0.5], [1, 1], 0), {}, "rates has 1 entries and flops has 2; both need one per branch"),
        (("exact", [0.5], [0], 0), {}, r"flops\[0\] is 0.0"),
        (("exact", [], [], 0), {}, "flops is empty"),
        (("exact", [0.5], [1], 1.5), {}, "seed is 1.5; allowed is an integer"),
        (
            ("exakt", [0.5], [1], 0),
            {},
            "mask sampler 'exakt' is unknown; known are cyclic, exact, independent",
        ),
        (("exact", [0.5], [1], 0), {"pool_size": 3}, "mask sampler 'exact' has no option 'pool_size'; allowed: none"),
        (("pool", [0.5], [1], 0), {"size": 3}, "no option 'size'; allowed: pool_size, pool_of"),
        (("pool", [0.5], [1], 0), {"pool_size": 0}, "pool_size is 0; allowed is 1 and above"),
        (
            ("pool", [0.5], [1], 0),
            {"pool_of": "pool"},
            "pool_of is 'pool'; allowed is balanced or another",
        ),
        (("pool", [0.5], [1], 0), {"pool_of": "what"}, "mask sampler 'what' is unknown"),
        (("nested", [0.5], [1], 0), {"uniform": "even"}, "uniform is 'even'; allowed is golden or random"),
    ],
)
def test_sampler_says_what_is_wrong(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        Sampler(*arguments, **options)


def test_negative_steps_are_refused():
    with pytest.raises(ConfigError, match="step is -1; allowed is 0 and above"):
        Sampler("exact", [0.5], [1], 0).draw(-1)
