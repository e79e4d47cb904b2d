"""Invalid values, and ways to damage valid ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import nn

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**70,
    -(2**70),
    0.5,
    -0.5,
    1.0,
    1e-320,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    "",
    "x",
    "0.5",
    "auto",
    "nested",
    "\x00",
    "é" * 300,
    b"x",
    (),
    [],
    [0.5],
    [math.nan] * 4,
    [0.5] * 4,
    [True] * 4,
    ["x"] * 4,
    [[]] * 4,
    {},
    {"a": 1},
    {0.5},
    1j,
    range(4),
    float,
    object(),
    Path("nowhere"),
    torch.zeros(()),
    torch.zeros(4),
    torch.tensor(math.nan),
    nn.Linear(2, 2),
    ValueError("a value"),
)


def hostile(random: Random) -> Any:
    """One invalid value, or a list, tuple or dict of some."""
    kind = random.randrange(8)
    if kind == 0:
        return [random.choice(HOSTILE) for _ in range(random.randrange(6))]
    if kind == 1:
        return {random.choice(("a", "version", "rates")): random.choice(HOSTILE) for _ in range(random.randrange(3))}
    return random.choice(HOSTILE)


def damaged(value: Any, random: Random) -> Any:
    """A copy of plain data with one item replaced, removed or repeated."""
    if isinstance(value, dict) and value:
        key = random.choice(list(value))
        rest = {name: entry for name, entry in value.items() if name != key}
        return rest if random.random() < 0.3 else {**rest, key: damaged(value[key], random)}
    if isinstance(value, list) and value and random.random() < 0.7:
        place = random.randrange(len(value))
        middle: Sequence[Any] = random.choice(([], [value[place]] * 2, [damaged(value[place], random)]))
        return [*value[:place], *middle, *value[place + 1 :]]
    return hostile(random)
