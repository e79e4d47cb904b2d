"""FLOPs of each branch as a function of the shapes a step sees.

Counted, never typed in: the operators of a recorded forward are summed with PyTorch's own formulas
(`torch.utils.flop_counter`). For text models the same forward is recorded at two lengths; per row of the batch a
branch costs `a*s + b*s**2` FLOPs for `s` tokens (projections and attention), so two counts give every length.

Sliding windows count as full attention, which is what PyTorch's attention with a mask computes; a kernel that skips
what lies outside of the window does less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows and tokens per row of one step's batch. `sequence_length` is 0 where there are no tokens to count."""

    batch_size: int
    sequence_length: int = 0


@dataclasses.dataclass(frozen=True)
class FlopsModel:
    """FLOPs of one row: `linear[i] * s + quadratic[i] * s**2`, or `constant[i]` where only one shape was counted."""

    linear: tuple[float, ...]
    quadratic: tuple[float, ...]
    constant: tuple[float, ...]

    def at(self, shape: Shape) -> tuple[int, ...]:
        """FLOPs of one forward of every branch, at least 1 (a branch must weigh something)."""
        rows, s = shape.batch_size, shape.sequence_length
        each = zip(self.linear, self.quadratic, self.constant, strict=True)
        return tuple(max(1, round(rows * (a * s + b * s * s + c))) for a, b, c in each)


def fitted(short: Sequence[int], long: Sequence[int], short_shape: Shape, long_shape: Shape) -> FlopsModel:
    """From counts at two lengths.

    A branch that costs less per token at the longer length pads short inputs to a chunk (linear attention): it is taken
    as proportional, at the cost per token of the longer one.
    """
    s, t = short_shape.sequence_length, long_shape.sequence_length
    per_token = [
        (x / (short_shape.batch_size * s), y / (long_shape.batch_size * t)) for x, y in zip(short, long, strict=True)
    ]
    quadratic = tuple(max(0.0, (y - x) / (t - s)) for x, y in per_token)
    linear = tuple(max(0.0, y - q * t) for (_, y), q in zip(per_token, quadratic, strict=True))
    return FlopsModel(linear, quadratic, (0.0,) * len(linear))


def counted_once(counts: Sequence[int], shape: Shape) -> FlopsModel:
    """From counts at one shape: proportional to the rows, whatever else changes."""
    zeros = (0.0,) * len(counts)
    return FlopsModel(zeros, zeros, tuple(count / max(1, shape.batch_size) for count in counts))


def shape_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
    """Rows and tokens of a batch, from the arguments of a forward."""
    for name in TOKEN_ARGUMENTS:
        value = kwargs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return Shape(int(value.shape[0]), int(value.shape[1]))
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() >= 1]
    if not tensors:
        return Shape(1)
    first = tensors[0]
    tokens = int(first.shape[1]) if first.dim() == 2 and not first.is_floating_point() else 0
    return Shape(int(first.shape[0]), tokens)
