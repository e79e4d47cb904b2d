"""Branches that a forward does not run are no part of the budget: early exits, towers without input, skipped layers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dropbp
from dropbp.device import dynamo_graph_count
from dropbp.masks.budget import TOLERANCE, shortfall
from dropbp.masks.idle import CountedForward, correct_counters
from dropbp.masks.plan import Conditions
from tests.campaigns.zoo.training import flops_of_backward
from tests.common.engine_models import Block, assert_same_gradients, plain_batch, take_gradients
from tests.test_pace import BRANCHES, DROP_RATES, FLOPS, MASKS, Shape, schedule

WIDTH, STEPS = 8, 60

Call = Callable[[nn.Module, int], Tensor]


class Tower(nn.Module):
    """`depth` is the number of blocks to run, None for all; `skip` is the chance of each to be left out."""

    def __init__(self, blocks: int = 6, skip: float = 0.0) -> None:
        super().__init__()
        self.blocks, self.skip = nn.ModuleList(Block(WIDTH) for _ in range(blocks)), skip
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor, depth: int | None = None) -> Tensor:
        for block in self.blocks[:depth]:
            if not self.training or torch.rand(()) >= self.skip:
                x_BSD = block(x_BSD)
        return self.head(x_BSD)


class Towers(nn.Module):
    """Each tower runs where it is given an input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Tower(4), Tower(3)

    def forward(self, one: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        each = ((self.one, one), (self.other, other))
        return torch.stack([tower(x).mean() for tower, x in each if x is not None])


def batch(step: int) -> Tensor:
    return plain_batch(step, WIDTH)


CALLS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "one tower": (Towers, lambda model, step: model(batch(step))),
    "towers in turn": (Towers, lambda model, step: model(**{("one", "other")[step % 2]: batch(step)})),
    "a tower falls silent": (Towers, lambda model, step: model(batch(step), batch(step) if step < 30 else None)),
    "exit anywhere": (Tower, lambda model, step: model(batch(step), depth=1 + step * 7 % 6)),
    "exit rises": (Tower, lambda model, step: model(batch(step), depth=1 + step // 10)),
    "exit half way": (Tower, lambda model, step: model(batch(step), depth=3)),
    "skipped at random": (lambda: Tower(skip=0.3), lambda model, step: model(batch(step))),
}


def example_of(model: nn.Module) -> Any:
    return (batch(0), batch(1)) if isinstance(model, Towers) else batch(0)


@pytest.mark.parametrize("steps", [STEPS, None])
@pytest.mark.parametrize("name", CALLS)
def test_the_budget_is_that_of_the_branches_that_run(name: str, steps: int | None) -> None:
    """PyTorch counts the backward of every step, of a plain step, and of one whose branches are all dropped."""
    make, call = CALLS[name]
    torch.manual_seed(1)
    model = make().train()
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, example_inputs=example_of(model), steps=steps, max_activations=None)
    model(*((batch(0), batch(1)) if isinstance(model, Towers) else (batch(0),)))  # the first forward keeps the gradient
    skipped, whole = 0, 0
    for step in range(STEPS):
        losses = []
        for net in (model, plain):
            torch.manual_seed(step)
            losses.append(call(net, step).square().mean())
        assert torch.equal(*losses)
        of_all = flops_of_backward(losses[1])
        with handle.engine.measuring((True,) * len(handle.branches)):
            torch.manual_seed(step)
            rest = flops_of_backward(call(model, step).square().mean())
        skipped, whole = skipped + of_all - flops_of_backward(losses[0]), whole + of_all - rest
    realised = skipped / whole
    assert handle.report()["realised_drop_rate"] == pytest.approx(realised, abs=TOLERANCE)
    assert steps is None or abs(realised - 0.5) <= TOLERANCE
    assert abs(realised - 0.5) <= TOLERANCE or "did not run" in (shortfall(handle.schedule) or "")


def test_what_was_compiled_before_hides_no_idle_branches(fresh_compiler: None) -> None:
    torch.compile(torch.sin, backend="eager")(torch.ones(2))
    assert dynamo_graph_count()
    test_the_budget_is_that_of_the_branches_that_run("exit half way", STEPS)


@settings(max_examples=60)
@given(
    DROP_RATES,
    MASKS,
    st.sampled_from([None, 80]),
    st.lists(st.integers(0, (1 << BRANCHES) - 1), min_size=1, max_size=8),
    st.booleans(),
)
def test_the_statistics_count_what_ran(
    rate: float, masks: str, steps: int | None, idle: list[int], ranks: bool
) -> None:
    one, flops = schedule(rate, masks, steps=steps), FLOPS.at(Shape(2, 32))
    dropped = seen = 0.0
    for step in range(80):
        plan, left_out = one.next(Shape(2, 32), Conditions(multi_rank=ranks)), idle[step % len(idle)]
        owed = one.pace.owed
        correct_counters(one, CountedForward.latest(one), {i: 0.0 for i in range(BRANCHES) if left_out >> i & 1})
        assert not ranks or one.pace.owed == owed  # ranks leave out branches of their own
        ran = [0 if left_out >> i & 1 else f for i, f in enumerate(flops)]
        dropped += sum(f for i, f in enumerate(ran) if plan.dropped >> i & 1)
        seen += sum(ran)
    assert one.statistics.flops_dropped == pytest.approx(dropped, abs=1e-3)
    assert one.statistics.flops_seen == pytest.approx(seen, abs=1e-3)
    other = schedule(rate, masks, steps=steps)
    other.load(json.loads(json.dumps(one.state())))
    assert [other.next(Shape(2, 32), Conditions(multi_rank=ranks)) for _ in range(5)] == [
        one.next(Shape(2, 32), Conditions(multi_rank=ranks)) for _ in range(5)
    ]


def test_a_forward_that_runs_every_branch_is_counted_in_full() -> None:
    torch.manual_seed(1)
    model = Tower().train()
    handle = dropbp.enable(model, 0.5, example_inputs=batch(0), steps=8)
    for step in range(8):
        model(batch(step)).square().mean().backward()
        with torch.no_grad():
            model(batch(step), depth=2)
        with handle.engine.measuring((False,) * 12):
            model(batch(step), depth=2)
    assert not handle.schedule.idle
    assert handle.schedule.statistics.flops_seen == 8 * handle.schedule.at_batch_shape.total


def test_compiled_blocks_count_as_run() -> None:
    torch.manual_seed(1)
    model = Tower(3).train()
    handle = dropbp.enable(model, 0.5, example_inputs=batch(0))
    dropbp.compile_blocks(handle, backend="eager")
    for step in range(4):
        model(batch(step)).square().mean().backward()
    assert not handle.schedule.idle


def test_every_branch_that_runs_has_its_plain_gradient_or_none() -> None:
    torch.manual_seed(1)
    model = Tower().train()
    plain = copy.deepcopy(model)
    handle = dropbp.enable(model, 0.5, example_inputs=batch(0), steps=STEPS)
    trained = 0
    for step in range(STEPS):
        depth = 1 + step % 6
        found = take_gradients(model, model(batch(step), depth=depth).square().mean())
        expected = take_gradients(plain, plain(batch(step), depth=depth).square().mean())
        kept = {name: gradient for name, gradient in found.items() if gradient is not None}
        assert_same_gradients(kept, {name: expected[name] for name in kept})
        trained += any(name.startswith("blocks") for name in kept)
    assert trained and handle.report()["forwards"] == STEPS
