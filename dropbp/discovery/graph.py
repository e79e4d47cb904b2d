"""Finds the additions to the residual stream in a recorded forward.

If the autograd graph adds two tensors `x + f(x)` and one operand depends on the other, the dependent operand `f(x)` is
a branch, and the other is the residual stream. Scalings, casts, shifts and reshapes of the stream are ignored. Of
nested branches only the outermost counts. A "branch" that is itself a residual stream (a long skip around many blocks)
does not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from dropbp.discovery.trace import Call, Node, Trace
from dropbp.discovery.walks import reached

Edge = tuple[int, int]  # (consumer node, source node)

ADDITIONS = ("AddBackward", "SubBackward", "AddcmulBackward")
SHIFTS = ("AddBackward", "SubBackward")
PRODUCTS = ("MulBackward", "BmmBackward")
SCALINGS_AND_VIEWS = (
    "MulBackward", "DivBackward", "ToCopyBackward", "ViewBackward", "ReshapeAliasBackward", "UnsafeViewBackward",
    "PermuteBackward", "TransposeBackward", "TBackward", "CloneBackward", "AliasBackward", "ExpandBackward",
    "SqueezeBackward", "UnsqueezeBackward", "NativeDropoutBackward", "SliceBackward",
    "AsStridedBackward",
)  # fmt: skip
OWN_STREAM_SHARE = 0.8


@dataclasses.dataclass(frozen=True)
class ResidualAddition:
    """An addition to the stream.

    Attributes:
        node: the (last) addition.
        base: the stream before it.
        edges: for each branch, the edge from an addition to the branch's output.
        starts: for each branch, the point where it left the stream: `base`, or an earlier one if it is added late.
    """

    node: int
    base: int
    edges: tuple[Edge, ...]
    starts: tuple[int, ...]

    @property
    def branches(self) -> tuple[tuple[Edge, int], ...]:
        return tuple(zip(self.edges, self.starts, strict=True))


class Graph:
    """A trace with the look-ups that the analysis needs."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace = trace
        self.nodes = trace.nodes
        self.calls = trace.calls
        self.consumers = trace.consumers()
        self.parameter_names = {**trace.stand_ins, **{id(p): name for name, p in model.named_parameters()}}
        self.by_sequence = {node.sequence: node.index for node in self.nodes if not node.is_leaf}
        self.nodes_in_call = {call.index: self._made_by(call) for call in self.calls}

    def _made_by(self, call: Call) -> tuple[int, ...]:
        numbers = (self.by_sequence.get(s) for s in range(call.start, call.end))
        return tuple(n for n in numbers if n is not None)

    def tensors_into(self, node: Node) -> tuple[int, ...]:
        """Inputs of a node that are not parameters or other leaves."""
        return tuple(i for i in node.inputs if not self.nodes[i].is_leaf)

    def ancestors(self, start: int, floor: int) -> set[int]:
        """All nodes and leaves that `start` depends on, itself included, down to node `floor`."""
        nodes, limit = self.nodes, self.nodes[floor].sequence
        return set(
            reached([start], lambda n: [s for s in nodes[n].inputs if nodes[s].is_leaf or nodes[s].sequence >= limit])
        )

    def depends(self, start: int, on: int) -> bool:
        return start != on and on in self.ancestors(start, on)

    def is_private(self, node: int) -> bool:
        """Whether the node's output has a single consumer and is not returned by the model."""
        return len(self.consumers[node]) == 1 and node not in self.trace.roots

    def place(self, node: int) -> str:
        """Qualified name of the module whose own forward created the node; empty for the model itself."""
        call = self.trace.call_of[node]
        return self.calls[call].name if call >= 0 else ""

    def base_of(self, operand: int) -> int:
        """The operand without the scalings, shifts, casts, reshapes and gates applied to it."""
        while True:
            source = self._below(self.nodes[operand])
            if source is None:
                return operand
            operand = source

    def _below(self, node: Node) -> int | None:
        tensors = self.tensors_into(node)
        if len(tensors) == 1 and node.name.startswith(SCALINGS_AND_VIEWS + SHIFTS):
            return tensors[0]
        if len(tensors) == 2 and node.name.startswith(PRODUCTS):
            return self._gated(*tensors)
        return None

    def _gated(self, one: int, other: int) -> int | None:
        """The factor of a product from which the other factor was computed: `gate(x) * x` is a scaled x."""
        for gate, stream in ((one, other), (other, one)):
            base = self.base_of(stream)
            if self.depends(gate, base):
                return base
        return None


@dataclasses.dataclass(frozen=True)
class _Sum:
    """A chain of additions in one forward: its last node, and its terms as edges (addition, term)."""

    node: int
    terms: tuple[Edge, ...]


def residual_additions(graph: Graph) -> list[ResidualAddition]:
    """Every addition of the form stream + branches, last one first."""
    sums = _sums(graph)
    first = [(s, addition) for s in sums if (addition := _as_residual(graph, s)) is not None]
    bases: dict[int, list[int]] = {}
    for _, addition in first:
        bases.setdefault(graph.trace.call_of[addition.node], []).append(addition.base)
    return [_with_late_terms(graph, s, addition, bases[graph.trace.call_of[addition.node]]) for s, addition in first]


def _sums(graph: Graph) -> list[_Sum]:
    found: list[_Sum] = []
    inner: set[int] = set()
    for node in reversed(graph.nodes):
        if node.index not in inner and is_sum(graph, node):
            terms, absorbed = _terms(graph, node)
            inner |= absorbed
            found.append(_Sum(node.index, terms))
    return found


def unexplained_sums(graph: Graph, branches: Collection[Edge]) -> list[int]:
    """Additions with a term that is neither the stream nor a branch."""
    base_of = {addition.node: addition.base for addition in residual_additions(graph)}

    def is_explained(total: _Sum) -> bool:
        base = base_of.get(total.node)
        return base is not None and all(edge in branches or graph.base_of(edge[1]) == base for edge in total.terms)

    return [total.node for total in _sums(graph) if not is_explained(total)]


def is_sum(graph: Graph, node: Node) -> bool:
    """Whether the node adds two tensors, rather than a tensor and a parameter."""
    return node.name.startswith(ADDITIONS) and len(graph.tensors_into(node)) >= 2


def _terms(graph: Graph, node: Node) -> tuple[tuple[Edge, ...], set[int]]:
    """The terms of a sum written as a chain of additions in one forward, and the additions in between."""
    terms: list[Edge] = []
    absorbed: set[int] = set()
    pending = [node.index]
    while pending:
        current = pending.pop()
        for source in graph.tensors_into(graph.nodes[current]):
            if _continues(graph, node, source):
                absorbed.add(source)
                pending.append(source)
            else:
                terms.append((current, source))
    return tuple(terms), absorbed


def _continues(graph: Graph, root: Node, source: int) -> bool:
    same_forward = graph.trace.call_of[source] == graph.trace.call_of[root.index]
    return same_forward and is_sum(graph, graph.nodes[source]) and len(graph.consumers[source]) == 1


def _as_residual(graph: Graph, total: _Sum) -> ResidualAddition | None:
    """The sum as stream + branches; the stream is the term on which most others depend. None if none depends on one."""
    best: tuple[int, tuple[Edge, ...]] = (0, ())
    for _, stream in total.terms:
        base = graph.base_of(stream)
        edges = tuple(e for e in total.terms if e[1] != stream and _leaves(graph, e[1], base))
        if len(edges) > len(best[1]):
            best = base, edges
    base, edges = best
    return ResidualAddition(total.node, base, edges, (base,) * len(edges)) if edges else None


def _leaves(graph: Graph, term: int, stream: int) -> bool:
    return graph.is_private(term) and graph.depends(term, stream)


def _with_late_terms(graph: Graph, total: _Sum, addition: ResidualAddition, bases: Sequence[int]) -> ResidualAddition:
    """Add terms computed from an earlier point of the stream in the same forward (shortcut experts)."""
    edges, starts = list(addition.edges), list(addition.starts)
    earlier = [base for base in bases if base < addition.base and graph.depends(addition.base, base)]
    for edge in total.terms:
        if edge in edges or graph.base_of(edge[1]) == addition.base:
            continue
        start = next((base for base in earlier if _leaves(graph, edge[1], base)), None)
        if start is not None:
            edges.append(edge)
            starts.append(start)
    return dataclasses.replace(addition, edges=tuple(edges), starts=tuple(starts))


def outermost(graph: Graph, residual_additions: Sequence[ResidualAddition]) -> list[ResidualAddition]:
    """Additions outside all branches of others; a long skip that is itself a residual stream is no branch."""
    kept: list[ResidualAddition] = []
    covered: set[int] = set()
    for position, addition in enumerate(residual_additions):
        if addition.node in covered:
            continue
        own = [
            (edge, start)
            for edge, start in addition.branches
            if _is_branch(graph, addition, edge[1], start, residual_additions[position + 1 :])
        ]
        if not own:
            continue
        edges, starts = zip(*own, strict=True)
        kept.append(dataclasses.replace(addition, edges=edges, starts=starts))
        for (_, head), start in own:
            covered |= graph.ancestors(head, start) - {start}
    return kept


def _is_branch(
    graph: Graph, addition: ResidualAddition, head: int, start: int, later: Sequence[ResidualAddition]
) -> bool:
    span = _span(graph, start, head)
    return _has_module(graph, addition, span) and not _is_stream(graph, span, later)


def _span(graph: Graph, start: int, head: int) -> set[int]:
    """Nodes between the point where a branch left the stream and its output."""
    return graph.ancestors(head, start) - graph.ancestors(start, start)


def _has_module(graph: Graph, addition: ResidualAddition, span: Iterable[int]) -> bool:
    own = graph.trace.call_of[addition.node]
    return any(graph.trace.call_of[n] != own for n in span if not graph.nodes[n].is_leaf)


def _is_stream(graph: Graph, span: set[int], later: Sequence[ResidualAddition]) -> bool:
    inner: list[set[int]] = []
    for addition in later:
        if addition.node in span:
            spans = [_span(graph, start, head) for (_, head), start in addition.branches]
            if any(_has_module(graph, addition, s) for s in spans):
                inner.append(set().union(*spans))
    if len(inner) < 2:
        return False
    return _elements(graph, set().union(*inner)) >= OWN_STREAM_SHARE * max(1, _elements(graph, span))


def _elements(graph: Graph, nodes: Iterable[int]) -> int:
    leaves = (graph.nodes[n].leaf for n in nodes)
    return sum(leaf.numel() for leaf in leaves if leaf is not None and leaf.dim() >= 2)
