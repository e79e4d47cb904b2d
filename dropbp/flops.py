"""FLOPs of a model as a function of the input shape.

FLOPs are counted, never given by hand: the formulas of `torch.utils.flop_counter` are summed over the operators of a
recorded forward. The same forward is recorded at several lengths, and a polynomial is fitted to the counts. Per row of
the batch, a branch costs `a*s + b*s**2` FLOPs for `s` tokens (projections and attention). If an encoder reads `s`
tokens and a decoder `t`, cross-attention adds `s*t`. Layers that read images or sound beside the text cost in
proportion to the size of those. A forward with another number of rows shows the part of the cost that does not depend
on it, such as projections of relative positions.

A sliding window counts as full attention, which is what PyTorch's masked attention computes. A kernel that skips the
part outside the window does less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

TOKENS = ("input_ids", "inputs_embeds")
SOUND = ("input_features", "input_values")
MEDIA = (*SOUND, "pixel_values", "pixel_values_videos", "images")
TARGETS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
LEAST, STEP = "least", "step"
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    """Shape of one step's batch.

    Attributes:
        batch_size: rows.
        sequence_length: tokens per row (of the encoder, if there is one); 0 if the inputs are not tokens.
        target_length: tokens per row of a decoder whose length differs; 0 if it does not.
        media_size: elements per row of the images and sounds that accompany the tokens.
    """

    batch_size: int
    sequence_length: int = 0
    target_length: int = 0
    media_size: int = 0

    @property
    def lengths(self) -> tuple[int, int]:
        """Source length and target length."""
        return self.sequence_length, self.target_length or self.sequence_length

    @property
    def terms(self) -> dict[str, int]:
        """The terms of the cost polynomial for one row."""
        s, t = self.lengths
        return {"1": 1, "s": s, "ss": s * s, "t": t, "tt": t * t, "st": s * t, "m": self.media_size}


@dataclasses.dataclass(frozen=True)
class FlopsModel:
    """FLOPs of each branch.

    Attributes:
        coefficients: for each branch, the coefficients of `Shape.terms` for one row; `LEAST`, a lower bound for one
            row; and `STEP`, the FLOPs of a forward that do not depend on the number of rows.
    """

    coefficients: tuple[Mapping[str, float], ...]

    def at(self, shape: Shape) -> tuple[int, ...]:
        """FLOPs of every branch, at least 1, so that each branch has a positive weight."""
        return tuple(max(1, round(self._of(each, shape))) for each in self.coefficients)

    def _of(self, branch: Mapping[str, float], shape: Shape) -> float:
        terms = shape.terms
        row = sum(factor * terms[name] for name, factor in branch.items() if name in terms)
        return shape.batch_size * max(row, branch.get(LEAST, 0.0)) + branch.get(STEP, 0.0)


def fitted(counts: Mapping[Shape, Sequence[int]]) -> FlopsModel:
    """Fit the cost of every branch to its counts at several shapes, the largest shape last.

    The shapes are a single one (costs are then taken as proportional to the length), some that differ in one length, or
    all combinations of two source and two target lengths. Before these there may be one of them with another number of
    rows.

    A branch that costs less per token at the longer length pads short inputs to a chunk (linear or local attention).
    Its cost is taken as proportional to the length, at the rate of the longest shape, but never below the cost of the
    smallest.
    """
    branches = zip(*counts.values(), strict=True)
    return FlopsModel(tuple(_coefficients(dict(zip(counts, each, strict=True))) for each in branches))


def _coefficients(counts: Mapping[Shape, int]) -> dict[str, float]:
    step, same_rows = _of_a_step(counts)
    found = _of_a_row({shape: (count - step) / shape.batch_size for shape, count in same_rows.items()})
    return {**found, STEP: step} if step else found


def _of_a_step(counts: Mapping[Shape, int]) -> tuple[float, Mapping[Shape, int]]:
    """FLOPs that do not depend on the number of rows, and the counts without the shape with another number of rows."""
    (first, count), *others = counts.items()
    rows = others[-1][0].batch_size if others else first.batch_size
    if first.batch_size == rows:
        return 0.0, counts
    more = counts[dataclasses.replace(first, batch_size=rows)] - count
    per_row = more / (rows - first.batch_size)
    return max(0.0, count - per_row * first.batch_size), dict(others)


def _of_a_row(per_row: Mapping[Shape, float]) -> dict[str, float]:
    last = list(per_row)[-1]
    constant = "m" if last.media_size else "1"
    sources, targets = ({shape.lengths[i] for shape in per_row} for i in (0, 1))
    if len(per_row) == 1:
        term = "1" if last.media_size or not last.sequence_length else "s"
        return {term: per_row[last] / last.terms[term]}
    if len(sources) > 1 and len(targets) > 1 and not all(s == t for s, t in (shape.lengths for shape in per_row)):
        basis = _basis_of_two(per_row)
    else:
        length = "s" if len(sources) > 1 else "t"
        basis = ([constant] if len(per_row) > 2 else []) + [length, 2 * length]
    found = _solved(per_row, basis)
    if min(found.values()) < 0:
        term = basis[-1][0]
        longest = max(per_row, key=lambda shape: shape.terms[term])
        return {term: per_row[longest] / longest.terms[term], LEAST: min(per_row.values())}
    return found


def pads(counts: Mapping[Shape, Sequence[int]]) -> bool:
    """Whether a branch pads short inputs to a chunk longer than most recorded lengths."""
    return any(LEAST in each for each in fitted(counts).coefficients)


def _basis_of_two(per_row: Mapping[Shape, float]) -> list[str]:
    """Terms for two lengths. An encoder branch depends on the source alone; a decoder branch may depend on both."""
    by_source, by_target = (
        any(
            per_row[one] != per_row[other]
            for one in per_row
            for other in per_row
            if one.lengths[1 - axis] == other.lengths[1 - axis]
        )
        for axis in (0, 1)
    )
    if by_source and by_target:
        return ["s", "st", "t", "tt"]
    return ["t", "tt"] if by_target else ["s", "ss"]


def _solved(per_row: Mapping[Shape, float], basis: Sequence[str]) -> dict[str, float]:
    with _disable_current_modes():  # discovery may run under fake tensors
        return _least_squares(per_row, basis)


def _least_squares(per_row: Mapping[Shape, float], basis: Sequence[str]) -> dict[str, float]:
    table = torch.tensor(
        [[shape.terms[name] for name in basis] for shape in per_row], dtype=torch.float64, device="cpu"
    )
    values = torch.tensor(list(per_row.values()), dtype=torch.float64, device="cpu")
    scale = table.abs().amax(dim=0)
    solution = torch.linalg.lstsq(table / scale, values[:, None]).solution[:, 0]
    noise = _ROUNDING * float(values.abs().max())
    each = zip(basis, solution.tolist(), scale.tolist(), strict=True)
    return {name: 0.0 if abs(value) <= noise else value / factor for name, value, factor in each}


def count_flops(step: Callable[[], object]) -> int:
    """FLOPs of everything that a function runs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused kernels hide theirs on CPU
        step()
    return int(counter.get_total_flops())


def shape_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
    """Rows and lengths of a batch, read from the arguments of a forward."""
    tokens, sound, target = (_first(names, kwargs) for names in (TOKENS, SOUND, TARGETS))
    source = tokens or sound or target
    if source is None:
        return _unnamed(args, kwargs)
    rows, length = int(kwargs[source].shape[0]), length_of(source, kwargs[source])
    other = length if target is None or kwargs[target].shape[0] != rows else length_of(target, kwargs[target])
    return Shape(rows, length, 0 if other == length else other, _media(kwargs, rows) if tokens else 0)


def _first(names: Sequence[str], kwargs: Mapping[str, Any]) -> str | None:
    """The first of these arguments that is a tensor with at least two dimensions."""
    values = {name: kwargs.get(name) for name in names}
    return next((name for name, v in values.items() if isinstance(v, torch.Tensor) and v.dim() >= 2), None)


def length_axis(name: str, value: torch.Tensor) -> int:
    """The dimension of the tokens; for a spectrum, `(rows, bins, frames)` or transposed, the longer one."""
    return 2 if name == "input_features" and value.dim() == 3 and value.shape[2] > value.shape[1] else 1


def length_of(name: str, value: torch.Tensor) -> int:
    """Tokens, samples or frames per row."""
    return int(value.shape[length_axis(name, value)])


def _media(kwargs: Mapping[str, Any], rows: int) -> int:
    values = (kwargs.get(name) for name in MEDIA)
    return sum(v.numel() for v in values if isinstance(v, torch.Tensor)) // rows


def is_sequence(value: Any) -> bool:
    """Whether the shape of an argument fits token ids or embeddings."""
    return isinstance(value, torch.Tensor) and value.dim() == (3 if value.is_floating_point() else 2)


def _unnamed(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Shape:
    """Shape from arguments without known names. The first tensor gives the rows; sequences give the lengths."""
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() >= 1]
    rows = int(tensors[0].shape[0]) if tensors else 1
    if not tensors or not is_sequence(tensors[0]):
        return Shape(rows)
    lengths = [int(v.shape[1]) for v in tensors if is_sequence(v)]
    return Shape(rows, lengths[0], next((length for length in lengths if length != lengths[0]), 0))
