"""A block that runs a varying number of times counts as often as it runs, and a biased gradient is told."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dropbp
from dropbp.masks.budget import TOLERANCE, shortfall
from tests.campaigns.zoo.training import flops_of_backward
from tests.common.engine_models import Block, assert_same_gradients, plain_batch, take_gradients

WIDTH, STEPS = 32, 60


class Recurrent(nn.Module):
    """The blocks `again` run `times` times, each by itself; with `whole`, all blocks one after another."""

    def __init__(self, again: Sequence[int] = (), blocks: int = 6, whole: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(blocks))
        self.again, self.whole = again, whole
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor, times: int = 1) -> Tensor:
        for _ in range(times if self.whole else 1):
            for place, block in enumerate(self.blocks):
                for _ in range(times if place in self.again else 1):
                    x_BSD = block(x_BSD)
        return self.head(x_BSD)


class Halting(nn.Module):
    """Its block runs until the inputs say stop."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        for block in self.blocks:
            for _ in range(1 + int(x_BSD.shape[0] * 1000 * x_BSD[0, 0, 0].detach().abs()) % 3):
                x_BSD = block(x_BSD)
                if x_BSD.shape[0] == 1:
                    break
        return x_BSD


def batch(step: int) -> Tensor:
    return plain_batch(step, WIDTH)


def times_at(step: int) -> int:
    return 1 + step * 7 % 4


def enabled(model: nn.Module, recorded: int, **options: Any) -> dropbp.Handle:
    inputs = {"x_BSD": batch(0), "times": recorded}
    return dropbp.enable(model, 0.5, example_inputs=inputs, max_activations=None, **options)


MODELS = {
    "lowest block": {"again": (0,)},
    "highest block": {"again": (5,)},
    "two blocks": {"again": (2, 3)},
    "every block": {"again": (0, 1, 2), "blocks": 3},
}


@pytest.mark.parametrize("steps", [STEPS, None])
@pytest.mark.parametrize("recorded", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_the_budget_counts_a_block_as_often_as_it_runs(name: str, recorded: int, steps: int | None) -> None:
    """PyTorch counts the backward of every step and of a plain one; the head's weight alone can not be dropped."""
    torch.manual_seed(1)
    model = Recurrent(**MODELS[name]).train()
    plain = copy.deepcopy(model)
    handle = enabled(model, recorded, steps=steps)
    model(batch(0))  # the first forward keeps the gradient
    head = flops_of_backward(model.head(batch(0)).square().mean())
    skipped = whole = 0
    for step in range(STEPS):
        loss, expected = (net(batch(step), times_at(step)).square().mean() for net in (model, plain))
        assert torch.equal(loss, expected)
        of_all = flops_of_backward(expected)
        skipped, whole = skipped + of_all - flops_of_backward(loss), whole + of_all - head
    realised = skipped / whole
    assert handle.report()["realised_drop_rate"] == pytest.approx(realised, abs=TOLERANCE)
    assert steps is None or abs(realised - 0.5) <= 2 * TOLERANCE
    named = ("more or less often", "did not run")
    assert abs(realised - 0.5) <= TOLERANCE or any(word in (shortfall(handle.schedule) or "") for word in named)


@pytest.mark.parametrize("masks", ["exact", "independent"])
def test_masks_that_drop_anywhere_count_it_too(masks: str) -> None:
    torch.manual_seed(1)
    model = Recurrent((5,)).train()
    plain = copy.deepcopy(model)
    handle = enabled(model, 1, masks=masks)
    model(batch(0))
    skipped = whole = 0
    for step in range(STEPS):
        of_all = flops_of_backward(plain(batch(step), times_at(step)).square().mean())
        loss = model(batch(step), times_at(step)).square().mean()
        with handle.engine.measuring((True,) * len(handle.branches)):
            rest = flops_of_backward(model(batch(step), times_at(step)).square().mean())
        skipped, whole = skipped + of_all - flops_of_backward(loss), whole + of_all - rest
    assert handle.report()["realised_drop_rate"] == pytest.approx(skipped / whole, abs=TOLERANCE)


@pytest.mark.parametrize("recorded", [1, 2])
@pytest.mark.parametrize("options", [{"again": (2, 3)}, {"whole": True, "blocks": 3}])
def test_a_biased_gradient_of_a_repeated_block_is_told_with_its_name(
    options: dict[str, Any], recorded: int, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    model = Recurrent(**options).train()
    plain = copy.deepcopy(model)
    enabled(model, recorded, steps=2 * STEPS)
    biased = []
    for step in range(STEPS):
        caplog.clear()
        got = take_gradients(model, model(batch(step), times_at(step)).square().mean())
        expected = take_gradients(plain, plain(batch(step), times_at(step)).square().mean())
        kept = {name: gradient for name, gradient in got.items() if gradient is not None}
        try:
            assert_same_gradients(kept, {name: expected[name] for name in kept})
        except AssertionError:
            biased.append([m for m in caplog.messages if "was called" in m])
    if recorded == 1:
        first, *others = biased
        assert "blocks." in first[0] and "1 times when dropbp was enabled" in first[0] and "example_inputs" in first[0]
        assert not any(others)
    else:
        assert not biased


def test_a_block_whose_calls_follow_neither_shape_nor_recording_is_told(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    model = Halting().train()
    handle = dropbp.enable(model, 0.5, example_inputs=batch(0)[:1])
    assert handle.engine.structure.calls_follow_shape
    with caplog.at_level(logging.WARNING, "dropbp.engine.idle"):
        for step in range(STEPS):
            model(batch(step)).square().mean().backward()
    (message,) = [record.getMessage() for record in caplog.records if record.name == "dropbp.engine.idle"]
    assert message.startswith("blocks.") and "inputs of the same shape" in message


class RowByRow(Recurrent):
    """Runs each row by itself, so its calls follow the number of rows, as do its FLOPs."""

    def forward(self, x_BSD: Tensor, times: int = 1) -> Tensor:
        return torch.cat([super(RowByRow, self).forward(row) for row in x_BSD.split(1)])


def test_calls_that_follow_the_shape_count_once() -> None:
    torch.manual_seed(1)
    model = RowByRow(blocks=3).train()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=batch(0)[:1])
    for step in range(4):
        model(batch(step)).square().mean().backward()
    assert handle.schedule.statistics.flops_seen == pytest.approx(4 * handle.schedule.at_batch_shape.total)
