"""Gradients by path length: the number of branches that a gradient passed.

At every branch of a residual network the gradient takes either the branch or the bypass. The gradient at the start of
the residual stream is therefore a sum over 2^N paths, C(N, k) of which pass k branches. One backward gives the gradient
of a single path: its branches pass the gradient on and their bypasses block it; all other branches do the reverse.
Dropping branches at rate p weakens paths of length k to (1-p)^k, and path lengths show what that costs.

Source: Veit et al., arXiv:1605.06431, section 4.3; DropBP, arXiv:2402.17812, appendix.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dropbp.discovery.cuts import needs
from dropbp.discovery.graph import Graph
from dropbp.discovery.record import Recorder
from dropbp.discovery.structure import Structure
from dropbp.sensitivity.edges import edges_of_branches
from dropbp.sensitivity.measure import checked_loss
from dropbp.sensitivity.onepass import BranchInput, Source, input_edges

Closure = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class PathLength:
    """Paths that pass exactly `length` branches.

    Attributes:
        length: number of branches passed.
        count: number of such paths.
        norm: mean norm of the gradient along one sampled path.
        spread: standard deviation of that norm.
        total: count * norm, an upper bound for the norm of their sum.
        together: norm of the sum over all of them; NaN if only one of several was sampled.
    """

    length: int
    count: int
    norm: float
    spread: float
    total: float
    together: float


def path_lengths(
    model: nn.Module, structure: Structure, closure: Closure, samples: int, seed: int = 0
) -> tuple[PathLength, ...]:
    """Gradients at the start of the residual stream along random paths of every length, 0 to N.

    Args:
        model: not enabled.
        structure: its branches.
        closure: runs one forward and returns the loss.
        samples: paths sampled per length; all of them if there are no more.
        seed: seed of the sampling.
    """
    paths = Paths(model, structure, closure)
    chosen, branches = random.Random(seed), range(len(structure.branches))
    try:
        return tuple(_of_length(paths, k, _sampled(chosen, branches, k, samples)) for k in range(len(branches) + 1))
    finally:
        paths.close()


class Paths:
    """One forward, and one backward along chosen paths per request."""

    def __init__(self, model: nn.Module, structure: Structure, closure: Closure) -> None:
        self.model, self.count = model, len(structure.branches)
        recorder = Recorder(model, count_flops=False)
        with recorder:
            self.loss = checked_loss(closure())
            graph = Graph(recorder.trace(self.loss), model)
            need = needs(graph, edges_of_branches(graph, structure))
            edges = input_edges(graph, recorder.functions, need, self.count)
        recorder.functions = ()
        self.gates = [_Gate(source, entering) for source, entering in _by_source(edges).items()]
        self.first = next(gate for gate in self.gates if 0 in gate.branches)

    def gradient(self, taken: Sequence[int] | None) -> Tensor:
        """The gradient at the start of the stream along the path through these branches; None: along all paths."""
        for gate in self.gates:
            gate.set(None if taken is None else frozenset(taken))
        self.loss.backward(retain_graph=True)
        self.model.zero_grad(set_to_none=True)
        if self.first.passed is None:
            raise RuntimeError("no gradient arrived where the first branch begins")
        return self.first.passed

    def close(self) -> None:
        """Free the graph: its nodes hold their hooks, and the hooks hold the nodes."""
        for gate in self.gates:
            gate.remove()


class _Gate:
    """A point where branches leave the stream. It passes on only the gradients of the followed paths."""

    def __init__(self, source: Source, entering: Sequence[BranchInput]) -> None:
        self.place = source[1]
        self.branches = {branch_input.branch for branch_input in entering}
        self.taken: frozenset[int] | None = None
        self.brought: dict[int, Tensor] = {}
        self.passed: Tensor | None = None
        self._handles: list[RemovableHandle] = [
            branch_input.consumer.register_hook(self._watch(branch_input)) for branch_input in entering
        ]
        self._handles.append(source[0].register_prehook(self._arrive))

    def set(self, taken: frozenset[int] | None) -> None:
        self.taken, self.brought, self.passed = taken, {}, None

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, branch_input: BranchInput) -> Callable[..., None]:
        def leave(inputs: Sequence[Tensor | None], outputs: Any) -> None:
            gradient, branch = inputs[branch_input.place], branch_input.branch
            if gradient is not None:
                before = self.brought.get(branch)
                self.brought[branch] = gradient if before is None else before + gradient

        return leave

    def _arrive(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        whole = gradients[self.place]
        if whole is None:
            return tuple(gradients)
        self.passed = self._let_through(whole)
        return tuple(self.passed if place == self.place else gradient for place, gradient in enumerate(gradients))

    def _let_through(self, whole: Tensor) -> Tensor:
        if self.taken is None:
            return whole.clone()
        taken = self.branches & self.taken
        if len(taken) > 1:  # a path takes at most one of several parallel branches
            return torch.zeros_like(whole)
        if taken:
            return self.brought.get(next(iter(taken)), torch.zeros_like(whole)).clone()
        return whole - sum(self.brought.values()) if self.brought else whole.clone()


def _by_source(edges: Sequence[Sequence[BranchInput]]) -> dict[Source, list[BranchInput]]:
    found: dict[Source, list[BranchInput]] = {}
    for branch_input in (branch_input for entering in edges for branch_input in entering):
        found.setdefault(branch_input.source, []).append(branch_input)
    return found


def _sampled(chosen: random.Random, branches: Sequence[int], length: int, samples: int) -> list[tuple[int, ...]]:
    """Distinct paths, sorted."""
    wanted = min(samples, math.comb(len(branches), length))
    found: set[tuple[int, ...]] = set()
    while len(found) < wanted:
        found.add(tuple(sorted(chosen.sample(branches, length))))
    return sorted(found)


def _of_length(paths: Paths, length: int, sample: Sequence[tuple[int, ...]]) -> PathLength:
    gradients = [paths.gradient(path).flatten().double() for path in sample]
    norms = [float(gradient.norm()) for gradient in gradients]
    count, mean = math.comb(paths.count, length), statistics.fmean(norms)
    spread = statistics.pstdev(norms)
    return PathLength(length, count, mean, spread, count * mean, count * _length_of_mean(gradients, count))


def _length_of_mean(gradients: Sequence[Tensor], count: int) -> float:
    """Norm of the mean without the sampling noise: products of different gradients are free of it, squares are not.

    0 if the noise exceeds the mean itself.
    """
    total, squares = sum(gradients), math.fsum(float(g @ g) for g in gradients)
    number, whole = len(gradients), float(total @ total)  # type: ignore[operator]
    if number == count:
        return math.sqrt(whole) / number
    if number == 1:
        return math.nan
    products = (whole - squares) / (number * (number - 1))
    mixed = products + (squares / number - products) / count  # each path is paired with itself once
    return math.sqrt(max(0.0, mixed))
