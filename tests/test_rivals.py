"""The rivals do what their papers say, and the learning bench counts, orders and resumes its runs as it claims."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from dropbp.bench.common.small import Base, new_model
from dropbp.bench.learning import rivals
from dropbp.bench.learning.costs import Costs
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dropbp

SMALL = Base(layers=4, width=32, heads=2, sequence_length=16)
NAMES = [
    *(name for name in rivals.METHODS if "capped" not in name),
    "nested geometric",
    "nested plateau:0.1",
    "nested freeze every 4",
    "nested linear biased-stem",
]


@pytest.fixture
def model() -> nn.Module:
    made: nn.Module = new_model(SMALL)
    return made


@pytest.fixture
def window() -> torch.Tensor:
    return torch.randint(256, (2, SMALL.sequence_length), generator=torch.Generator().manual_seed(0))


def step(model: nn.Module, method: rivals.Method, window: torch.Tensor, number: int = 0) -> None:
    model.zero_grad()
    method.begin_step(number)
    with method.micro_batch():
        loss = model(input_ids=window, labels=window).loss
        if loss.requires_grad:
            loss.backward()


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is not None}


def blocks_trained(model: nn.Module) -> set[int]:
    return {int(name.split(".")[2]) for name in trained(model) if ".layers." in name}


@pytest.mark.parametrize("name", [*NAMES, "nested shelf capped", "default capped"])
def test_a_method_leaves_no_trace(model: nn.Module, window: torch.Tensor, name: str) -> None:
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    loss = model(input_ids=window, labels=window).loss
    with rivals.method(name, model, 0.5, seed=0, steps=8) as method:
        for number in range(3):
            step(model, method, window, number)
    assert torch.equal(model(input_ids=window, labels=window).loss, loss)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: v[0] for n, v in before.items()}
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


@pytest.mark.parametrize("name", NAMES)
def test_work_counts_the_flops_that_run(model: nn.Module, window: torch.Tensor, name: str) -> None:
    costs = costs_of(model, window)
    with rivals.method(name, model, 0.5, seed=0, steps=8) as method:
        for number in range(4):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                step(model, method, window, number)
            assert costs.of(method.work()) == pytest.approx(counter.get_total_flops(), rel=0.03)


def costs_of(model: nn.Module, window: torch.Tensor) -> Costs:
    return Costs.counted(model, {"input_ids": window, "labels": window})


def test_an_unknown_method_is_refused_with_the_known_ones(model: nn.Module) -> None:
    with pytest.raises(dropbp.DropBPError, match=r"'lottery' is unknown; known are plain, lora, freezing"):
        rivals.method("lottery", model, 0.5, 0, 1)


# -- freezing, LISA, LayerDrop, PLD


def test_freezing_never_trains_the_lowest_share_nor_the_embedding(model: nn.Module, window: torch.Tensor) -> None:
    with rivals.Freezing(model, 0.5) as method:
        step(model, method, window)
        assert blocks_trained(model) == {2, 3}
        assert "model.embed_tokens.weight" not in trained(model)
        assert "lm_head.weight" in trained(model)
        assert method.work() == pytest.approx((1.0, 0.5, 0.5))


def test_freezing_gives_what_is_trained_its_exact_gradient(model: nn.Module, window: torch.Tensor) -> None:
    step(model, rivals.Method(model), window)
    full = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with rivals.Freezing(model, 0.75) as method:
        step(model, method, window)
        assert all(torch.equal(model.get_parameter(name).grad, full[name]) for name in trained(model))


def test_lisa_trains_other_blocks_after_each_period_and_always_the_rest(model: nn.Module, window: torch.Tensor) -> None:
    with rivals.LISA(model, 0.75, period=2, seed=0) as method:
        seen = []
        for number in range(40):
            step(model, method, window, number)
            seen.append(tuple(blocks_trained(model)))
            assert {"model.embed_tokens.weight", "lm_head.weight"} <= trained(model)
    assert all(len(blocks) == 1 for blocks in seen)
    assert seen[::2] == seen[1::2]
    assert {blocks for (blocks,) in seen} == {0, 1, 2, 3}


def test_layerdrop_skips_blocks_in_training_and_none_in_evaluation(model: nn.Module, window: torch.Tensor) -> None:
    model.eval()
    whole = model(input_ids=window).logits
    model.train()
    with rivals.LayerDrop(model, 0.5, seed=0) as method:
        shares = []
        for _ in range(100):
            step(model, method, window)
            shares.append(method.work().forward)
            assert len(blocks_trained(model)) == round(4 * shares[-1])
        assert sum(shares) / 100 == pytest.approx(0.5, abs=0.08)  # 400 coins: a standard deviation of .025
        assert torch.equal(model.eval()(input_ids=window).logits, whole)


def test_pld_follows_its_schedule_over_steps_and_depth(model: nn.Module) -> None:
    with rivals.ProgressiveLayerDrop(model, steps=100) as method:
        method.begin_step(0)
        assert method.keep_rates() == [1.0] * 4
        method.begin_step(1)
        theta = 0.5 * math.exp(-1) + 0.5
        assert method.keep_rates() == pytest.approx([1 - i / 4 * (1 - theta) for i in (1, 2, 3, 4)])
        method.begin_step(100)
        assert method.keep_rates() == pytest.approx([0.875, 0.75, 0.625, 0.5])
        assert method.scale(0.5) == 2.0


def test_a_kept_block_of_pld_adds_its_scaled_update(model: nn.Module, window: torch.Tensor) -> None:
    block = rivals.blocks_of(model)[0]
    rotary = model.model.rotary_emb
    x_BSH = model.model.embed_tokens(window)
    more = {"position_embeddings": rotary(x_BSH, torch.arange(window.shape[1])[None])}
    plain = block(x_BSH, **more)
    with rivals.ProgressiveLayerDrop(model) as method:
        method.skips[0].scale = 2.0
        assert torch.allclose(block(x_BSH, **more) - x_BSH, 2 * (plain - x_BSH), atol=1e-6)


# -- DropBP as published, and ours


@pytest.mark.parametrize(("rate", "realised"), [(0.5, 0.525), (0.75, 0.772), (0.875, 0.891)])
def test_published_masks_overshoot_as_the_published_code_does(rate: float, realised: float) -> None:
    coins = random.Random(0)
    masks = [rivals.floored_mask([rate] * 64, rate, coins) for _ in range(4000)]
    assert all(sum(mask) >= rate * 64 for mask in masks)
    assert sum(map(sum, masks)) / 64 / 4000 == pytest.approx(realised, abs=0.002)


def test_published_masks_drop_the_lowest_branch_most() -> None:
    coins = random.Random(0)
    masks = [rivals.floored_mask([0.5] * 64, 0.5, coins) for _ in range(4000)]
    first, last = (sum(mask[i] for mask in masks) / 4000 for i in (0, -1))
    assert first == pytest.approx(0.73, abs=0.04)
    assert last == pytest.approx(0.5, abs=0.03)


def test_the_floor_is_filled_from_the_highest_rate() -> None:
    assert rivals.floored_mask([0.0, 0.1, 0.2, 0.0], 0.25, random.Random(0))[2]


def test_published_dropbp_draws_for_each_micro_batch(model: nn.Module, window: torch.Tensor) -> None:
    with rivals.PublishedDropBP(model, 0.5, seed=0) as method:
        seen = Counter()
        for _ in range(20):
            step(model, method, window)
            seen[method.handle.mask] += 1
            assert 1 - method.work().activations >= 0.3
    assert len(seen) > 10


def test_nested_masks_train_the_embedding_only_where_its_gradient_is_exact(
    model: nn.Module, window: torch.Tensor
) -> None:
    step(model, rivals.Method(model), window)
    full = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    depths = set()
    with rivals.method("nested uniform_depth", model, 0.4, seed=0, steps=1) as method:
        for number in range(30):
            step(model, method, window, number)
            depths.add(sum(method.handle.mask))
            assert ("model.embed_tokens.weight" in trained(model)) == (not any(method.handle.mask))
            assert all(torch.equal(model.get_parameter(name).grad, full[name]) for name in trained(model))
    assert len(depths) > 3


def test_a_plateau_has_two_levels_and_meets_the_budget() -> None:
    rates = rivals.plateau([1.0, 2.0] * 8, 0.5, deep=0.1)
    assert set(rates[:4]) == {0.9} and rates[-1] == 0.0
    assert sum(f * p for f, p in zip([1.0, 2.0] * 8, rates, strict=True)) == pytest.approx(12)


def test_slow_deep_scales_learning_rates_by_the_share_of_steps(model: nn.Module) -> None:
    with rivals.method("nested shelf slow-deep", model, 0.5, seed=0, steps=1) as method:
        groups = method.groups(2.0)
        rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert len(rate_of) == len(list(model.parameters()))
        for branch in method.handle.branches:
            (first, *_) = model.get_submodule(branch.modules[-1]).parameters()
            assert rate_of[id(first)] == pytest.approx(2 * (1 - branch.rate))
        assert rate_of[id(model.lm_head.weight)] == 2.0
        assert rate_of[id(model.model.embed_tokens.weight)] == groups[0]["lr"]


def test_the_default_anneals_and_saves_its_share_over_the_run(model: nn.Module, window: torch.Tensor) -> None:
    with rivals.method("default", model, 0.5, seed=0, steps=40) as method:
        kept = []
        for number in range(40):
            step(model, method, window, number)
            kept.append(method.work().activations)
    assert kept == sorted(kept, reverse=True)
    assert kept[0] >= 0.7 and kept[-1] <= 0.3
    assert sum(kept) / 40 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("of", ["nested shelf", "default"])
def test_capped_masks_are_the_same_and_keep_less(of: str, model: nn.Module, window: torch.Tensor) -> None:
    kept = [kept_at_deepest(name, model, window) for name in (of, f"{of} capped")]
    assert kept[0][1] == kept[1][1]
    assert kept[1][0] < 0.8 * kept[0][0]


def kept_at_deepest(name: str, model: nn.Module, window: torch.Tensor) -> tuple[int, tuple[bool, ...] | None]:
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with rivals.method(name, model, 0.5, seed=0, steps=1) as method, method.deepest():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=window, labels=window)
        return sum(sizes), method.handle.mask


def test_the_same_name_may_keep_a_mask(model: nn.Module, window: torch.Tensor) -> None:
    with rivals.method("nested linear every 4", model, 0.5, seed=0, steps=1) as method:
        masks = []
        for number in range(12):
            step(model, method, window, number)
            masks.append(method.handle.mask)
    assert masks[0::4] == masks[3::4]
    assert len(set(masks)) > 1
