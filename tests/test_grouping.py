"""An optimizer and a clipping cut by branch do what the uncut ones do, in pieces that do not depend on the mask."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dropbp
from dropbp.lazy.grouping import clip_grad_norm_grouped, split_groups, step_by_group, zero_fill_gradients
from tests.common.engine_models import plain_batch, plain_net

WIDTH = 4


class Stack(nn.Module):
    """Residual blocks between an embedding and a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, mask: tuple[bool, ...]) -> torch.Tensor:
        x = self.embedding(x)
        for norm, block, dropped in zip(self.norms, self.blocks, mask, strict=True):
            with torch.set_grad_enabled(not dropped):
                branch = block(norm(x))
            x = x + branch
        return self.head(x)


def names(model: nn.Module, parameters: list[torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if any(parameter is other for other in parameters)}


def backward(model: Stack, mask: tuple[bool, ...], seed: int = 0) -> None:
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))
    model(x, mask).square().sum().backward()


def by_branch(model: Stack, groups: Any = None) -> list[dict[str, Any]]:
    """The groups that `handle.group_parameters` makes for such a model: one for each branch, one for the rest."""
    pairs = zip(model.norms, model.blocks, strict=True)
    own = {id(p): i for i, modules in enumerate(pairs) for module in modules for p in module.parameters()}
    return split_groups(groups or [{"params": list(model.parameters())}], lambda p: own.get(id(p), -1))


# --- parameter groups


def grouped_names(model: nn.Module, given: Any = None, masks: str = "exact") -> list[set[str]]:
    with dropbp.enable(model, masks=masks, example_inputs=plain_batch()) as handle:
        return [names(model, group["params"]) for group in handle.group_parameters(given)]


def parameters_in(model: nn.Module, *modules: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(modules)}


def test_each_branch_gets_a_group_and_the_rest_gets_one() -> None:
    model = plain_net(blocks=1)
    assert grouped_names(model) == [
        parameters_in(model, "stem", "norm.", "head"),
        parameters_in(model, "blocks.0.norm1", "blocks.0.mix"),
        parameters_in(model, "blocks.0.norm2", "blocks.0.mlp"),
    ]


def test_the_stem_gets_a_group_of_its_own_if_it_is_frozen_at_times() -> None:
    model = plain_net(blocks=1)
    assert parameters_in(model, "stem") in grouped_names(model, masks="nested")


def test_options_of_the_groups_given_are_kept() -> None:
    model = plain_net(blocks=1)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    given_groups = [{"params": decayed, "weight_decay": 0.1, "lr": 2.0}, {"params": others, "weight_decay": 0.0}]
    with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
        groups = handle.group_parameters(given_groups)
    assert [group["weight_decay"] for group in groups] == [0.1] * 3 + [0.0] * 3
    assert [group.get("lr") for group in groups] == [2.0] * 3 + [None] * 3
    assert names(model, groups[1]["params"]) == {"blocks.0.mix.0.weight", "blocks.0.mix.2.weight"}


def test_parameters_shared_by_branches_get_a_group_of_their_own() -> None:
    model = plain_net(blocks=2)
    model.blocks[1].mix = model.blocks[0].mix
    found = grouped_names(model)
    assert parameters_in(model, "blocks.0.mix") in found
    assert {"blocks.0.norm1.weight", "blocks.0.norm1.bias"} in found


def test_frozen_parameters_are_left_out_unless_they_are_given() -> None:
    model = plain_net(blocks=1)
    model.blocks[0].mix.requires_grad_(False)
    trained = {"blocks.0.norm1.weight", "blocks.0.norm1.bias"}
    assert trained in grouped_names(model)
    assert trained | parameters_in(model, "blocks.0.mix") in grouped_names(model, [{"params": model.parameters()}])


@given(mask=st.lists(st.booleans(), min_size=3, max_size=3))
@settings(max_examples=8)
def test_in_every_group_all_gradients_are_there_or_none_is(mask: list[bool]) -> None:
    model = Stack()
    backward(model, tuple(mask))
    for group in by_branch(model):
        assert len({parameter.grad is None for parameter in group["params"]}) == 1


def test_grouped_optimizer_steps_are_bit_identical_to_ungrouped_ones() -> None:
    plain = Stack()
    grouped = copy.deepcopy(plain)
    optimizers = [
        torch.optim.AdamW(plain.parameters(), lr=0.1),
        torch.optim.AdamW(by_branch(grouped), lr=0.1),
    ]
    for seed, mask in enumerate([(False, True, False), (True, True, False), (False, False, True)]):
        for model, optimizer in zip((plain, grouped), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, mask, seed)
            optimizer.step()
    for ours, theirs in zip(grouped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_optimizer_that_exists_can_be_regrouped() -> None:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    optimizer.param_groups[:] = by_branch(model, optimizer.param_groups)
    before = model.blocks[1].weight.detach().clone()
    backward(model, (False, True, False))
    optimizer.step()
    assert len(optimizer.param_groups) == 4
    assert all(group["weight_decay"] == 0.3 for group in optimizer.param_groups)
    assert torch.equal(model.blocks[1].weight, before)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_stepping_by_group_is_bit_identical_to_one_step(make: type[torch.optim.Optimizer]) -> None:
    whole = Stack()
    by_group = copy.deepcopy(whole)
    boundaries: list[int] = []
    for model in (whole, by_group):
        optimizer = make(by_branch(model), lr=0.1)  # type: ignore[call-arg]
        groups = optimizer.param_groups
        for seed, mask in enumerate([(False, True, False), (False, False, True)]):
            optimizer.zero_grad()
            backward(model, mask, seed)
            if model is whole:
                optimizer.step()
            else:
                step_by_group(optimizer, lambda: boundaries.append(1))
        assert optimizer.param_groups is groups
    assert len(boundaries) == 2 * 4
    for ours, theirs in zip(by_group.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- clipping


def grouped_parameters(model: Stack) -> list[list[torch.Tensor]]:
    return [group["params"] for group in by_branch(model)]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
@pytest.mark.parametrize("mask", [(False, False, False), (True, False, True), (True, True, True)])
def test_grouped_clipping_equals_that_of_torch(norm_type: float, max_norm: float, mask: tuple[bool, ...]) -> None:
    ours = Stack()
    theirs = copy.deepcopy(ours)
    backward(ours, mask)
    backward(theirs, mask)
    norm = clip_grad_norm_grouped(grouped_parameters(ours), max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(theirs.parameters(), max_norm, norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("dtype", "norm_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_norms_are_computed_wide_and_gradients_keep_their_type(dtype: torch.dtype, norm_dtype: torch.dtype) -> None:
    weight = torch.ones(300, dtype=dtype, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    norm = clip_grad_norm_grouped([[weight]], 1.0)
    assert norm.dtype is norm_dtype
    torch.testing.assert_close(norm.item(), math.sqrt(300), rtol=1e-6, atol=0)
    assert weight.grad.dtype is dtype


def test_clipping_nothing_gives_zero() -> None:
    assert clip_grad_norm_grouped([], 1.0).item() == 0
    assert clip_grad_norm_grouped([[], [torch.ones(2, requires_grad=True)]], 1.0).item() == 0


class Segments(TorchDispatchMode):
    """What a lazy device would compile: the operations, with their shapes, between one boundary and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[object] = []
        self.recipes: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        shapes = tuple(tuple(a.shape) for a in torch.utils._pytree.tree_leaves(args) if isinstance(a, torch.Tensor))
        self.operations.append((str(func), shapes))
        return func(*args, **(kwargs or {}))

    def boundary(self) -> None:
        if self.operations:
            self.recipes.add(tuple(self.operations))
        self.operations = []


def clipping_recipes(depth: int, masks: list[tuple[bool, ...]]) -> set[tuple[object, ...]]:
    model, segments = Stack(depth), Segments()
    for mask in masks:
        model.zero_grad()
        backward(model, mask)
        with segments:
            clip_grad_norm_grouped(grouped_parameters(model), 1.0, step_boundary=segments.boundary)
    return segments.recipes


def test_pieces_of_the_clipping_depend_neither_on_the_mask_nor_on_the_depth() -> None:
    first_masks = [(False, False, False), (True, False, False)]
    later_masks = [*first_masks, (False, True, True), (True, True, False), (True, True, True)]
    assert clipping_recipes(3, later_masks) == clipping_recipes(3, first_masks)
    assert len(clipping_recipes(6, [(False,) * 6, (True, False) * 3])) == len(clipping_recipes(3, first_masks))


# --- zeros for gradients


def test_zero_fill_gives_each_skipped_parameter_a_gradient_and_leaves_the_others() -> None:
    model = Stack()
    model.head.requires_grad_(False)
    backward(model, (False, True, False))
    kept = model.blocks[0].weight.grad
    assert zero_fill_gradients(model.parameters()) == 4
    assert model.blocks[0].weight.grad is kept
    assert model.blocks[1].weight.grad is not None
    assert not model.blocks[1].weight.grad.any()
    assert model.head.weight.grad is None


def adamw_step(model: Stack, optimizer: torch.optim.Optimizer, mask: tuple[bool, ...], *, fill: bool) -> None:
    optimizer.zero_grad()
    backward(model, mask)
    if fill:
        zero_fill_gradients(model.parameters())
    optimizer.step()


@pytest.mark.parametrize(("fill", "moves"), [(False, False), (True, True)])
def test_zero_fill_lets_adamw_move_skipped_parameters_and_the_default_does_not(fill: bool, moves: bool) -> None:
    model = Stack()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    adamw_step(model, optimizer, (False, False, False), fill=fill)
    before = model.blocks[1].weight.detach().clone()
    adamw_step(model, optimizer, (False, True, False), fill=fill)
    assert torch.equal(model.blocks[1].weight, before) is not moves
