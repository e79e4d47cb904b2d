"""What feeds the residual stream before its first branch: embeddings, patch projections.

Under masks that train the top of a model down to a cut, every branch above the cut gets its exact gradient. The stem
lies below every cut but the deepest: what reaches it along the bare stream lacks the share of all dropped branches, and
moves it the wrong way. So such masks let the stem rest whenever the stream's first branch is dropped; then nothing at
all below the cut is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

from dropbp.discovery.graph import Graph, Join
from dropbp.discovery.liveness import Cover, needs


def stem_calls(graph: Graph, found: Sequence[Join]) -> dict[str, int]:
    """Names of the stem's modules with the branch, as a bit mask, whose dropping lets them rest.

    A stem whose output is used beyond the first addition (skips from the input) is left out: it always trains.
    """
    calls: dict[str, int] = {}
    joined = {join.node for join in found}
    for first, base in _starts(graph, found, joined).items():
        edges = [(user, base) for user in graph.consumers[base]]
        cover = Cover(graph, needs(graph, [edges]))
        calls.update({call.name: 1 << first for call in cover.tops if _runs_once(graph, call.name)})
    return calls


def _starts(graph: Graph, found: Sequence[Join], joined: set[int]) -> dict[int, int]:
    """For each stream its first branch and the point where it starts."""
    starts: dict[int, int] = {}
    seen: set[int] = set()
    for branch, join in enumerate(found):
        if join.base in seen or _is_downstream(graph, join.base, joined):
            continue
        between = graph.ancestors(join.node, join.base)
        if all(user in between for user in graph.consumers[join.base]):
            seen.add(join.base)
            starts[branch] = _last_of_chain(graph, join.base, between)
    return starts


def _last_of_chain(graph: Graph, base: int, between: set[int]) -> int:
    """The stem may go on with a scaling, a shift or a view of what it made: it ends where the stream is first used."""
    while True:
        users = graph.consumers[base]
        if len(users) != 1 or graph.base_of(users[0]) != graph.base_of(base):
            return base
        if not all(user in between for user in graph.consumers[users[0]]):
            return base
        base = users[0]


def _is_downstream(graph: Graph, base: int, joined: set[int]) -> bool:
    seen, pending = {base}, [base]
    while pending:
        number = pending.pop()
        if number in joined:
            return True
        fresh = [s for s in graph.nodes[number].inputs if s not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _runs_once(graph: Graph, name: str) -> bool:
    return sum(call.name == name for call in graph.calls) == 1
