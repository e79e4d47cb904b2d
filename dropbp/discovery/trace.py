"""The record of one forward as data: autograd nodes, the module calls that created them, and FLOPs, on one axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from dropbp.discovery.walks import nodes_below, sources

ACCUMULATE = "torch::autograd::AccumulateGrad"
IN_PLACE = "torch::autograd::CopySlices"  # an in-place write to a view; autograd does not tell which operator wrote
ADDED_IN_PLACE = "AddBackwardInPlace"  # our name for such a write by an addition


@dataclasses.dataclass(frozen=True)
class Node:
    """One autograd node; `inputs` are the indices of the nodes whose outputs it consumes."""

    index: int
    name: str
    sequence: int
    inputs: tuple[int, ...]
    leaf: torch.Tensor | None

    @property
    def is_leaf(self) -> bool:
        return self.leaf is not None


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one module, which created the nodes with `start <= sequence < end`.

    `reshapes`: its first tensor has another shape in the output than in the input. `outputs`: sequence numbers of the
        nodes that created its differentiable outputs; -1 for an output without a node.
    """

    index: int
    name: str
    start: int
    end: int
    parent: int
    reshapes: bool = False
    outputs: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trace:
    """The record of one forward, with `nodes` in the order of creation, leaves first.

    `flops` are stored under the sequence number of the node being created. `learned_masks` holds, for calls that ran an
    attention kernel with a mask made from parameters, the ids of these parameters. `kernel_by_weight` names the
    modules with a product whose kernel depends on whether its weight requires a gradient. `stand_ins` names, by id,
    tensors that were used instead of sharded parameters. `outputs` maps the keys of the model's outputs to their nodes.
    `modules_hold_tensors` tells whether modules hold differentiable tensors afterwards, such as router losses that the
    training loop collects. `identities` names the modules that returned their input and were given a node.
    """

    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]
    roots: frozenset[int]
    flops: Mapping[int, int]
    call_of: Mapping[int, int]
    learned_masks: Mapping[int, frozenset[int]] = dataclasses.field(default_factory=dict)
    kernel_by_weight: frozenset[str] = frozenset()
    stand_ins: Mapping[int, str] = dataclasses.field(default_factory=dict)
    outputs: Mapping[str, frozenset[int]] = dataclasses.field(default_factory=dict)
    modules_hold_tensors: bool = False
    identities: frozenset[str] = frozenset()

    @property
    def adds_in_place(self) -> bool:
        """Whether something is added in place to a view."""
        return any(node.name == ADDED_IN_PLACE for node in self.nodes)

    def made_by(self, kind: str) -> frozenset[str]:
        """The modules whose own forward created nodes of this kind."""
        made = (self.call_of[node.index] for node in self.nodes if node.name.startswith(kind))
        return frozenset(self.calls[call].name for call in made if call >= 0)

    def consumers(self) -> list[list[int]]:
        """For every node, the nodes that consume one of its outputs."""
        consumers: list[list[int]] = [[] for _ in self.nodes]
        for node in self.nodes:
            for source in node.inputs:
                consumers[source].append(node.index)
        return consumers


def collect(
    functions: Sequence[Any], added: Collection[int] = ()
) -> tuple[tuple[Node, ...], frozenset[int], tuple[Any, ...]]:
    """All nodes reachable from the outputs, leaves first, then in the order of creation; the roots; the autograd nodes.

    `added` are the sequence numbers of in-place writes to a view that are additions.
    """
    ordered = sorted(nodes_below(functions), key=sequence_of)
    index = {function: i for i, function in enumerate(ordered)}
    nodes = tuple(_node(function, index, added) for function in ordered)
    return nodes, frozenset(index[function] for function in functions), tuple(ordered)


def _node(function: Any, index: Mapping[Any, int], added: Collection[int]) -> Node:
    inputs = tuple(index[source] for source in sources(function))
    leaf = function.variable if _is_leaf(function) else None
    name, sequence = function.name(), sequence_of(function)
    name = ADDED_IN_PLACE if name == IN_PLACE and sequence in added else name
    return Node(index[function], name, sequence, inputs, leaf)


def _is_leaf(function: Any) -> bool:
    return bool(function.name() == ACCUMULATE)


def sequence_of(function: Any) -> int:
    """The sequence number of an autograd node, in the order of creation; leaves come before all others."""
    return -1 if _is_leaf(function) else int(function._sequence_nr())


def innermost_call(nodes: Sequence[Node], calls: Sequence[Call]) -> dict[int, int]:
    """The call that created each node. Later calls in the list lie inside earlier ones, so the last match wins."""
    owner: dict[int, int] = {}
    for call in calls:
        for sequence in range(call.start, call.end):
            owner[sequence] = call.index
    return {node.index: owner.get(node.sequence, -1) for node in nodes}
