"""The budget: what share of the FLOPs is dropped, in each step and over many."""

from __future__ import annotations

import math

import pytest
import torch

import dropbp
from tests.engine_models import tiny_llama, tokens

STEPS = 400


@pytest.mark.parametrize("drop_rate", [0.5, 0.75, 0.875])
def test_the_share_of_dropped_flops_is_the_drop_rate(drop_rate):
    model = tiny_llama(layers=4)
    handle = dropbp.enable(model, drop_rate, masks="exact")
    shares, counts = _train(model, handle)
    largest = max(branch.flops for branch in handle.branches) / sum(branch.flops for branch in handle.branches)
    assert abs(sum(shares) / STEPS - drop_rate) < 0.005 * drop_rate
    assert all(abs(share - drop_rate) < largest for share in shares)
    assert handle.report()["realised_drop_rate"] == pytest.approx(sum(shares) / STEPS)
    # Masks are fair coins for each branch: 4.5 standard deviations of a binomial, over 8 branches and 3 rates 1e-4.
    error = 4.5 * math.sqrt(drop_rate * (1 - drop_rate) / STEPS)
    assert all(abs(count / STEPS - drop_rate) < error for count in counts)


def test_unequal_rates_are_kept_branch_by_branch_and_in_sum():
    model = tiny_llama(layers=4)
    handle = dropbp.enable(model, masks="exact")
    rates = [0.9, 0.8, 0.7, 0.6, 0.4, 0.3, 0.2, 0.0]
    handle.set_rates(rates)
    shares, counts = _train(model, handle)
    flops = [branch.flops for branch in handle.branches]
    target = sum(r * f for r, f in zip(rates, flops, strict=True)) / sum(flops)
    assert abs(sum(shares) / STEPS - target) < 0.005
    assert all(abs(share - target) < max(flops) / sum(flops) for share in shares)
    for count, rate in zip(counts, rates, strict=True):
        assert abs(count / STEPS - rate) <= 4.5 * math.sqrt(rate * (1 - rate) / STEPS)


def test_report_counts_what_was_dropped():
    model = tiny_llama()
    handle = dropbp.enable(model)
    for mask in [(True, False, False, False), (True, True, False, False)]:
        with handle.fixed(mask):
            model(input_ids=tokens())
    report = handle.report()
    flops = [branch["flops"] for branch in report["branches"]]
    assert [branch["dropped"] for branch in report["branches"]] == [2, 1, 0, 0]
    assert [branch["realised_rate"] for branch in report["branches"]] == [1.0, 0.5, 0.0, 0.0]
    assert report["flops_skipped"] == 2 * flops[0] + flops[1]
    assert report["realised_drop_rate"] == pytest.approx((2 * flops[0] + flops[1]) / (2 * sum(flops)))
    assert "model.layers.1.mlp" in handle.summary() and "2 forwards" in handle.summary()


def _train(model, handle):
    shares, counts = [], [0] * len(handle.branches)
    batch = tokens(rows=1, length=2)
    for _ in range(STEPS):
        with torch.enable_grad():
            model(input_ids=batch)
        flops = [branch.flops for branch in handle.branches]
        shares.append(sum(f for f, drop in zip(flops, handle.mask, strict=True) if drop) / sum(flops))
        counts = [count + drop for count, drop in zip(counts, handle.mask, strict=True)]
    return shares, counts


@pytest.mark.parametrize("length", [4, 16, 96])
def test_nested_masks_meet_the_budget_at_lengths_other_than_the_one_discovered(length):
    """Attention weighs more in long sequences, so rates over depth depend on the length."""
    model = tiny_llama(8)
    handle = dropbp.enable(model, 0.5, masks="nested")
    ids = torch.randint(32, (2, length), generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        model(input_ids=ids, labels=ids)
    flops = [branch.flops for branch in handle.branches]
    expected = sum(f * branch.rate for f, branch in zip(flops, handle.branches, strict=True)) / sum(flops)
    assert expected == pytest.approx(0.5, rel=1e-9)
    assert handle.report()["realised_drop_rate"] == pytest.approx(0.5, abs=0.005)


def test_rates_that_were_set_stay_at_any_length():
    model = tiny_llama(2)
    handle = dropbp.enable(model, 0.5, masks="nested")
    handle.set_rates([0.9, 0.6, 0.3, 0.1])
    ids = torch.randint(32, (1, 24))
    model(input_ids=ids, labels=ids)
    assert handle.rates == (0.9, 0.6, 0.3, 0.1)
