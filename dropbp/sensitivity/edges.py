"""The edges of the branches in the graph of a closure, which may run the model several times, or only a part of it."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

from dropbp.discovery.branches import cuts_in
from dropbp.discovery.cuts import Cut
from dropbp.discovery.graph import Edge, Graph
from dropbp.discovery.structure import Structure
from dropbp.errors import StateError

logger = logging.getLogger(__name__)

NAMED_AT_MOST = 4


def edges_of_branches(graph: Graph, structure: Structure, ran: AbstractSet[str] | None = None) -> list[list[Edge]]:
    """The edges of each branch; a closure may run the model several times, or leave branches out.

    Args:
        graph: graph of the closure's loss.
        structure: the branches.
        ran: names of the branch modules that the closure called; None: all.

    Raises:
        StateError: the graph does not show every branch that ran.
    """
    found, count = cuts_in(graph, structure), len(structure.branches)
    if found and not len(found) % count:
        return [[edge for group in found[branch::count] for edge in group] for branch in range(count)]
    each, unknown = _edges_by_module(graph, structure, found)
    idle = [branch.name for branch in structure.branches if ran is not None and ran.isdisjoint(branch.modules)]
    hidden = [b.name for b, edges in zip(structure.branches, each, strict=True) if not edges and b.name not in idle]
    if unknown or hidden or not found:
        named = f", first {hidden[0]}" if hidden else ""
        raise StateError(
            f"The closure's graph shows {len(found)} branches, but the model has {count}; {len(hidden)} of them ran "
            f"without being shown{named}. Reentrant gradient checkpointing hides branches, and so does a frozen model "
            "below them. Use checkpointing with use_reentrant=False, or calibrate with method='exact'."
        )
    logger.warning(
        "The closure did not run %s, so the sensitivity of %d branches is 0 for it. If training runs them, pass "
        "several closures that together run every branch.",
        ", ".join(idle[:NAMED_AT_MOST]) + (f" and {len(idle) - NAMED_AT_MOST} more" if idle[NAMED_AT_MOST:] else ""),
        len(idle),
    )
    return each


def _edges_by_module(graph: Graph, structure: Structure, cuts: Sequence[Cut]) -> tuple[list[list[Edge]], int]:
    """The edges of each branch by the modules that made its output, and the number of cuts that belong to none."""
    branch_of = {name: i for i, branch in enumerate(structure.branches) for name in branch.modules}
    shared = {module.name for module in structure.branch_modules if module.per_call}
    each: list[list[Edge]] = [[] for _ in structure.branches]
    unknown = 0
    for cut in cuts:
        branch = _branch_above(graph, cut[0][1], {n: i for n, i in branch_of.items() if n not in shared})
        if branch is None:
            unknown += 1
        else:
            each[branch] += cut
    return each, unknown


def _branch_above(graph: Graph, start: int, branch_of: Mapping[str, int]) -> int | None:
    """The branch of the module call that is nearest before a node; None if there is none."""
    pending, seen = collections.deque([start]), {start}
    while pending:
        node = pending.popleft()
        parts = graph.place(node).split(".")
        inside = (branch_of.get(".".join(parts[:count])) for count in range(len(parts), 0, -1))
        branch = next((branch for branch in inside if branch is not None), None)
        if branch is not None:
            return branch
        fresh = [source for source in graph.nodes[node].inputs if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return None
