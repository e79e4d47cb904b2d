"""Parameters that must be frozen in a step although they lie in none of the branches that it drops.

A parameter's gradient is exact in a step that drops none of the branches between it and the outputs. The parameters of
a branch lie in the lowest of these. Others do not: embeddings, projectors, class tokens and positions feed the stream,
the norm of a post-norm block stands in it, one position bias serves all layers, an encoder's last norm feeds every
cross-attention. If a branch above such a parameter is dropped, the gradient that still reaches it along the residual
stream alone would move it in the wrong direction. Under masks that drop the bottom of a model, the parameter has its
exact gradient if the lowest branch above it is kept, and is frozen if that branch is dropped. These parameters are
called the stem of the model.

If all outputs of a module are frozen with the same branch, the module runs without recording. Otherwise the parameter
is frozen while the module that uses it runs. A parameter with several uses (tied embeddings, a block applied
repeatedly) needs the exact gradient of every use, so all its uses are frozen if the lowest branch above any of them is
dropped.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from dropbp.branch_sets import containing, lowest
from dropbp.discovery.cuts import ALWAYS_NEEDED, Cut, flows, needs
from dropbp.discovery.graph import Graph
from dropbp.discovery.module_paths import prefixes
from dropbp.discovery.structure import BranchModule, ScopedParameter, Stem
from dropbp.discovery.trace import Call


@dataclasses.dataclass(frozen=True)
class _Use:
    """A call that uses a parameter in its own forward; `lowest_above`: the lowest branch above it (a bit, 0: none)."""

    name: str
    call: int
    lowest_above: int
    in_branch: bool


def find_stem(graph: Graph, cuts: Sequence[Cut], parallel: Sequence[int]) -> Stem:
    """The modules and parameters to freeze in some steps; `parallel` sets of branches are only dropped together."""
    by_name: dict[str, list[_Use]] = {}
    for use in _uses(graph, cuts, parallel):
        by_name.setdefault(use.name, []).append(use)
    freezable = _FreezableModules(graph, cuts)
    modules: dict[str, int] = {}
    parameters: dict[ScopedParameter, None] = {}
    for name, uses in by_name.items():
        lowest_above = _lowest_above(uses)
        for use in uses if _is_outside_branches(uses) else ():
            module = freezable.outermost(use) if use.lowest_above else None
            if module is not None:
                modules[module.name] = use.lowest_above
            if use.lowest_above != lowest_above or not (module or use.in_branch):
                parameters[ScopedParameter(name, graph.calls[use.call].name, lowest_above)] = None
        if any(not use.lowest_above for use in uses) and lowest_above:  # a fused loss uses the weight without the head
            parameters[ScopedParameter(name, "", lowest_above)] = None
    return Stem(
        modules=modules,
        parameters=tuple(parameters),
        lowest_above={name: _lowest_above(uses).bit_length() - 1 for name, uses in by_name.items()},
        names=frozenset(name for name, uses in by_name.items() if _is_outside_branches(uses)),
        shared=frozenset(n for n, uses in by_name.items() if len({u.lowest_above for u in uses if u.in_branch}) > 1),
    )


def _lowest_above(uses: Iterable[_Use]) -> int:
    """The lowest branch above any of the uses, as a bit; 0 if there is none."""
    return min((use.lowest_above for use in uses if use.lowest_above), default=0)


def _is_outside_branches(uses: Sequence[_Use]) -> bool:
    """Whether the parameter lies neither in a single branch nor above all branches."""
    return len({use.lowest_above for use in uses}) > 1 or any(use.lowest_above and not use.in_branch for use in uses)


def with_unused(found: Stem, model: nn.Module, branch_modules: Iterable[BranchModule]) -> Stem:
    """Add the parameters that the recorded forward did not use; those inside a branch's module follow it."""
    lowest_above, unused = dict(found.lowest_above), []
    by_module = {module.name: module.needs for module in branch_modules}
    for name, parameter in model.named_parameters():
        if name in lowest_above or not parameter.is_floating_point():
            continue
        needs_of_module = next((by_module[path] for path in reversed(prefixes(name)) if path in by_module), None)
        if needs_of_module is None:
            unused.append(ScopedParameter(name, name.rpartition(".")[0], 1))
        lowest_above[name] = min(lowest(need).bit_length() - 1 for need in needs_of_module or (1,))
    names = tuple(entry.name for entry in unused)
    return dataclasses.replace(
        found,
        parameters=(*found.parameters, *unused),
        lowest_above=lowest_above,
        names=found.names.union(names),
        unused=names,
    )


def _uses(graph: Graph, cuts: Sequence[Cut], parallel: Sequence[int]) -> list[_Use]:
    cut = {edge: 1 << i for i, group in enumerate(cuts) for edge in group}
    need, flow = needs(graph, cuts), flows(graph, cuts)
    found: dict[_Use, None] = {}
    for leaf in graph.nodes:
        name = graph.parameter_names.get(id(leaf.leaf)) if leaf.is_leaf else None
        for user in graph.consumers[leaf.index] if name is not None else ():
            own = cut.get((user, leaf.index), 0)
            lowest_above = lowest(flow[user] | own)
            in_branch = not (own or need[user]) & ~containing(parallel, lowest_above)
            found[_Use(name or "", graph.trace.call_of[user], lowest_above, in_branch)] = None
    return list(found)


class _FreezableModules:
    """Decides for each use whether a whole module or only the parameter is frozen."""

    def __init__(self, graph: Graph, cuts: Sequence[Cut]) -> None:
        self.graph = graph
        self.need, self.flow = needs(graph, cuts), flows(graph, cuts)
        self._frozen_with_by_call: dict[int, int] = {}
        self._call_counts = Counter(call.name for call in graph.calls)

    def outermost(self, use: _Use) -> Call | None:
        """The outermost module around the use whose outputs are all frozen with it; None if there is none."""
        found, index = None, use.call
        while index >= 0 and self._frozen_with(index) == use.lowest_above:
            found, index = self.graph.calls[index], self.graph.calls[index].parent
        return found

    def _frozen_with(self, index: int) -> int:
        """The branch, as a bit, that must be dropped for the call to run without recording; 0 if there is none."""
        if index not in self._frozen_with_by_call:
            self._frozen_with_by_call[index] = self._branch_that_freezes(index)
        return self._frozen_with_by_call[index]

    def _branch_that_freezes(self, index: int) -> int:
        made = set(self.graph.nodes_in_call[index])
        if self._call_counts[self.graph.calls[index].name] > 1 or any(
            self.need[n] not in (0, ALWAYS_NEEDED) for n in made
        ):
            return 0
        outputs = [n for n in made if n in self.graph.trace.roots or not made.issuperset(self.graph.consumers[n])]
        branches = [lowest(self.flow[n]) for n in outputs]
        return max(branches) if branches and all(branches) else 0
