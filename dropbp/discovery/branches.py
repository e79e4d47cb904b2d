"""The edges of the graph that are cut to drop each branch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dropbp.discovery.cuts import Cut, exact_cuts
from dropbp.discovery.graph import Edge, Graph, ResidualAddition, outermost, residual_additions
from dropbp.errors import DiscoveryError

if TYPE_CHECKING:
    from dropbp.discovery.structure import Structure


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A term of an addition to the stream. `cut` drops it exactly; None if that is impossible."""

    edge: Edge
    addition: ResidualAddition
    cut: Cut | None

    @property
    def is_cut_at_addition(self) -> bool:
        """Whether the edge into the addition is the cut that drops it exactly."""
        return self.cut == [self.edge]


def find_candidates(graph: Graph) -> list[Candidate]:
    """All branches, in the order in which their outputs were created."""
    pairs = [(edge, addition) for addition in outermost(graph, residual_additions(graph)) for edge in addition.edges]
    pairs.sort(key=lambda pair: graph.nodes[pair[0][1]].sequence)
    cuts = exact_cuts(graph, [[edge] for edge, _ in pairs])
    return [Candidate(edge, addition, cut) for (edge, addition), cut in zip(pairs, cuts, strict=True)]


def parallel_sets(found: Sequence[Candidate]) -> tuple[int, ...]:
    """Neighbouring branches that leave the stream at the same point and are added to it at the same point, as bits."""
    places = [(branch.addition.node, dict(branch.addition.branches)[branch.edge]) for branch in found]
    runs = [list(run) for _, run in itertools.groupby(range(len(found)), key=places.__getitem__)]
    return tuple(sum(1 << branch for branch in run) for run in runs if len(run) > 1)


def branch_cuts(graph: Graph) -> list[Cut]:
    """For each branch, the edges that are cut to drop it, in the order of the branches' outputs."""
    return [found.cut for found in find_candidates(graph) if found.cut is not None]


def cuts_in(graph: Graph, structure: Structure) -> list[Cut]:
    """The edges of each branch of a known structure, in the graph of another forward."""
    if not structure.named:
        return branch_cuts(graph)
    cuts = exact_cuts(graph, [edges_leaving(graph, names) for names in structure.named])
    return [cut for cut in cuts if cut is not None]


def edges_leaving(graph: Graph, names: Sequence[str]) -> list[Edge]:
    """Every edge from outside the named modules to a node that they created."""
    inside: set[int] = set()
    for call in graph.calls:
        if call.name in names:
            inside |= set(graph.nodes_in_call[call.index])
    if not inside:
        raise DiscoveryError(
            f"branches= names {list(names)}, but the small forward never ran them, or they create nothing "
            "differentiable. Pass example_inputs=... that use them."
        )
    return [(user, n) for n in inside for user in graph.consumers[n] if user not in inside]
