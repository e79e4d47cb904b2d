"""Blocks that run in another order than at `enable` are noticed: masks that drop the lowest ones count on it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

import dropbp
from tests.common.engine_models import Block, plain_batch


class Routed(nn.Module):
    """Runs its blocks in the order of `route`; the same block may be there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(8) for _ in range(4)), nn.Linear(8, 8)

    def forward(self, x_BSD: Tensor, route: Iterable[int] = range(4)) -> Tensor:
        for place in route:
            x_BSD = self.blocks[place](x_BSD)
        return self.head(x_BSD)


def warnings_of(caplog: pytest.LogCaptureFixture, routes: Iterable[Iterable[int]], **options: object) -> list[str]:
    torch.manual_seed(1)
    model = Routed().train()
    with (
        caplog.at_level(logging.WARNING, "dropbp"),
        dropbp.enable(model, 0.5, example_inputs=plain_batch(), **options) as handle,
    ):
        for route in routes:
            model(plain_batch(), route).square().mean().backward()
        with handle.engine.measuring((True,) + (False,) * 7):
            model(plain_batch(), (3, 2, 1, 0)).square().mean().backward()
    return [record.getMessage() for record in caplog.records if "another order" in record.getMessage()]


@pytest.mark.parametrize("route", [(1, 0, 2, 3), (0, 1, 3, 2), (3, 0), (3, 2, 1, 0)])
@pytest.mark.parametrize("steps", [None, 24])
def test_another_order_warns_once_and_names_the_blocks(
    route: tuple[int, ...], steps: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = warnings_of(caplog, [range(4), *[route] * 12], steps=steps)
    named = re.match(r"blocks\.(\d) ran before blocks\.(\d),", found[0]) if len(found) == 1 else None
    assert named is not None, found
    first, second = map(int, named.groups())
    assert first > second and route.index(first) < route.index(second)


@pytest.mark.parametrize("routes", [[range(4)], [(0, 2), (1, 3), (3,), (0,)], [(0, 1), (2, 3)]])
def test_skipped_blocks_do_not_count_as_another_order(
    routes: list[Iterable[int]], caplog: pytest.LogCaptureFixture
) -> None:
    assert not warnings_of(caplog, routes * 6)


def test_masks_that_drop_anywhere_do_not_depend_on_the_order(caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings_of(caplog, [(3, 2, 1, 0)] * 8, masks="exact")
