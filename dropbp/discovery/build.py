"""Builds the structure of a model's residual branches from a recorded forward, without a table of architectures.

`dropbp.discovery.graph` finds the additions to the residual stream, `dropbp.discovery.cuts` the modules that can
run without recording. Sets of branches are bit masks held in Python integers: bit `i` is branch `i`, `ALWAYS_NEEDED`
is -1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from dropbp.branch_sets import containing
from dropbp.discovery.backward_flops import backward_work
from dropbp.discovery.branches import find_candidates, parallel_sets
from dropbp.discovery.cuts import ALWAYS_NEEDED, Cut, UnrecordedCalls, needs
from dropbp.discovery.graph import Graph, unexplained_sums
from dropbp.discovery.module_paths import block_of, common_prefix, container, element_of, prefixes
from dropbp.discovery.stem import find_stem, with_unused
from dropbp.discovery.structure import NO_BRANCH_ABOVE, Branch, BranchModule, BranchOutput, ScopedParameter, Structure
from dropbp.discovery.trace import Call, Trace
from dropbp.errors import DiscoveryError

COVERED_SHARE = 0.9


def analyse(trace: Trace, model: nn.Module) -> Structure:
    """The residual branches of the traced model.

    Raises DiscoveryError if no branch was found, or a block was not understood; the message names it.
    """
    trace, side_outputs = restricted_to_main_output(trace, model)
    graph = Graph(trace, model)
    every = find_candidates(graph)
    found = [branch for branch in every if branch.cut is not None]
    if not found:
        raise DiscoveryError(
            f"No residual branch was found in {type(model).__name__}: no addition `x + f(x)` whose f is made of "
            "modules. Name the branches yourself with branches=['layers.0.attention', ...]."
        )
    unexplained = unexplained_sums(graph, {branch.edge for branch in found})
    structure = structure_of(graph, model, [branch.cut or () for branch in found], unexplained, parallel_sets(found))
    inexact = sum(not branch.is_cut_at_addition for branch in every)
    return dataclasses.replace(structure, outputs=trained_outputs(trace), side_outputs=side_outputs, inexact=inexact)


def restricted_to_main_output(trace: Trace, model: nn.Module) -> tuple[Trace, bool]:
    """The trace restricted to the output at the end of the stream, and whether other outputs come out of branches.

    An output from inside a branch (router scores, attention maps) would keep the branch from being dropped. The nodes
    that lead to it are still recorded if a call asks for it: see `dropbp.engine.side_outputs`.
    """
    keys = trace.outputs if len(trace.outputs) > 1 else {}
    best, most = trace, _cut_at_additions(trace, model) if keys else 0
    for roots in keys.values():
        alone = dataclasses.replace(trace, roots=roots)
        count = _cut_at_additions(alone, model)
        if count > most:
            best, most = alone, count
    return best, best is not trace or trace.modules_hold_tensors


def _cut_at_additions(trace: Trace, model: nn.Module) -> int:
    """Number of branches that are dropped exactly by cutting the edge into their addition."""
    return sum(found.is_cut_at_addition for found in find_candidates(Graph(trace, model)))


def trained_outputs(trace: Trace) -> dict[str, bool]:
    """The outputs by their keys, each with whether it depends on a parameter that trains."""
    trained = [False] * len(trace.nodes)
    for node in trace.nodes:
        leaf = node.leaf
        own = isinstance(leaf, nn.Parameter) and leaf.requires_grad
        trained[node.index] = own or any(trained[source] for source in node.inputs)
    return {key: any(trained[root] for root in roots) for key, roots in trace.outputs.items()}


def structure_of(
    graph: Graph, model: nn.Module, cuts: Sequence[Cut], unexplained: Iterable[int] = (), parallel: tuple[int, ...] = ()
) -> Structure:
    """The structure of branches that are dropped by these cuts."""
    need = needs(graph, cuts)
    structure = _Builder(graph, model, cuts, need, UnrecordedCalls(graph, need), unexplained).build()
    stem = with_unused(find_stem(graph, cuts, parallel), model, structure.branch_modules)
    lowest_above = {  # the last of the branches that are dropped together, so that each has only its own weight
        name: containing(parallel, 1 << branch).bit_length() - 1
        for name, branch in stem.lowest_above.items()
        if branch != NO_BRANCH_ABOVE and name not in stem.unused
    }
    work = backward_work(graph, need, len(cuts), lowest_above)
    return dataclasses.replace(structure, stem=stem, parallel=parallel, work=work)


class _Builder:
    """Derives names, modules, scoped parameters and outputs of branches from a graph with its cut edges."""

    def __init__(
        self,
        graph: Graph,
        model: nn.Module,
        cuts: Sequence[Cut],
        need: Sequence[int],
        unrecorded: UnrecordedCalls,
        unexplained: Iterable[int] = (),
    ) -> None:
        self.graph, self.cuts, self.need, self.unrecorded = graph, cuts, need, unrecorded
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.names = [name for name, _ in model.named_modules()]
        self.unexplained = {n for n in unexplained if need[n] == ALWAYS_NEEDED}
        self.leaf_need = {id(node.leaf): need[node.index] for node in graph.nodes if node.is_leaf}
        self.flops_by_need, self.elements_by_need = _totals(graph, need)

    def build(self) -> Structure:
        trace, branch_modules, branches = self.graph.trace, self._branch_modules(), self._branches()
        outputs, unscalable = self._outputs(branches)
        blocks = self._block_masks(branches)
        self._check_blocks(branches)
        return Structure(
            branches=branches,
            branch_modules=branch_modules,
            scoped_parameters=self._scoped_parameters(),
            branch_outputs=outputs,
            unscalable=unscalable,
            blocks=blocks,
            parameters=self._parameter_needs(),
            coverage=self._coverage(),
            repeated=self._repeated(blocks, branch_modules),
            adds_in_place=trace.adds_in_place,
            kernel_by_weight=trace.kernel_by_weight,
            group_norms=trace.made_by("NativeGroupNormBackward"),
            identities=trace.identities,
        )

    def _branch_modules(self) -> tuple[BranchModule, ...]:
        calls: dict[str, list[Call]] = {}
        for call in self.graph.calls:
            calls.setdefault(call.name, []).append(call)
        outermost = {call.index for call in self.unrecorded.outermost}
        branch_modules = []
        for name, made in calls.items():
            needs = tuple(self.unrecorded.call_need[c.index] if c.index in outermost else ALWAYS_NEEDED for c in made)
            if any(call.index in outermost for call in made):
                branch_modules.append(BranchModule(name, needs, self._learned_mask(made)))
        return tuple(branch_modules) + self._uncalled_siblings(calls, branch_modules)

    def _learned_mask(self, calls: Sequence[Call]) -> tuple[str, ...]:
        masks = self.graph.trace.learned_masks
        leaves = {leaf for call in calls for leaf in masks.get(call.index, ())}
        return tuple(name for leaf, name in self.graph.parameter_names.items() if leaf in leaves)

    def _uncalled_siblings(
        self, calls: Mapping[str, object], branch_modules: Sequence[BranchModule]
    ) -> tuple[BranchModule, ...]:
        """Modules that this forward did not call (experts without tokens), treated like their siblings."""
        by_parent: dict[str, set[tuple[int, ...]]] = {}
        for module in branch_modules:
            by_parent.setdefault(container(module.name), set()).add(module.needs)
        uncalled, ran = [], {prefix for name in calls for prefix in prefixes(name)}  # lists are never called
        for name, module in self.modules.items():
            needs = by_parent.get(container(name), set())
            if name not in ran and needs and container(name) and any(True for _ in module.parameters()):
                uncalled.append(BranchModule(name, self._common(name, needs)))
        return tuple(uncalled)

    def _common(self, name: str, needs: set[tuple[int, ...]]) -> tuple[int, ...]:
        if len(needs) > 1:
            raise DiscoveryError(
                f"Module {name} was not called in the small forward, and its siblings belong to different branches, so "
                "it is unclear when to skip it. Pass example_inputs=... that use it, or branches=[...]."
            )
        return next(iter(needs))

    def _branches(self) -> tuple[Branch, ...]:
        branches: list[Branch] = []
        taken: dict[str, int] = {}
        for i in range(len(self.cuts)):
            modules = self._modules_of(i)
            name = self._name(self._owners(i, modules))
            taken[name] = taken.get(name, 0) + 1
            label = name if taken[name] == 1 else f"{name}#{taken[name]}"
            flops, elements = self.flops_by_need[1 << i], self.elements_by_need[1 << i]
            branches.append(Branch(label, modules, flops, 0.0, block_of(modules), elements))
        return tuple(branches)

    def _modules_of(self, branch: int) -> tuple[str, ...]:
        own = (c.name for c in self.unrecorded.outermost if self.unrecorded.call_need[c.index] == 1 << branch)
        return tuple(dict.fromkeys(own))

    def _owners(self, branch: int, modules: tuple[str, ...]) -> Sequence[str]:
        """The modules that name a branch: if it ends in an identity, those that hold parameters of it alone."""
        own = {n.rpartition(".")[0]: n for n, need in self._parameter_needs().items() if need == 1 << branch}
        return list(own) if own and not self.graph.trace.identities.isdisjoint(modules) else modules

    def _name(self, modules: Sequence[str]) -> str:
        weighty = [m for m in modules if _weight_elements(self.modules[m])] or list(modules)
        shared = common_prefix(weighty)
        if shared and shared != block_of(modules) and shared not in self._ancestors_of_lists:
            return shared
        return max(weighty, key=lambda m: _weight_elements(self.modules[m]))

    @functools.cached_property
    def _ancestors_of_lists(self) -> set[str]:
        lists = [n for n, m in self.modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        return {p for name in lists for p in prefixes(name)} | {""}

    def _parameter_needs(self) -> dict[str, int]:
        names = self.graph.parameter_names
        needs = {names.get(id(n.leaf)): self.need[n.index] for n in self.graph.nodes if n.is_leaf}
        return {name: need for name, need in needs.items() if name is not None and need not in (0, ALWAYS_NEEDED)}

    def _scoped_parameters(self) -> tuple[ScopedParameter, ...]:
        """Parameters that a branch uses directly, outside its skipped modules (layer scales, gates)."""
        found = {}
        for node in self.graph.nodes:
            name = self.graph.parameter_names.get(id(node.leaf)) if node.is_leaf else None
            need = self.need[node.index]
            if name is None or need in (0, ALWAYS_NEEDED):
                continue
            for user in self.graph.consumers[node.index]:
                if not self.unrecorded.is_unrecorded(user, need):
                    scope = self.graph.calls[self.graph.trace.call_of[user]].name
                    found[name, scope] = ScopedParameter(name, scope, need)
        return tuple(found.values())

    def _outputs(self, branches: Sequence[Branch]) -> tuple[tuple[BranchOutput, ...], dict[str, str]]:
        outputs: list[BranchOutput] = []
        unscalable: dict[str, str] = {}
        for i, branch in enumerate(branches):
            glue, first_unrecorded, _ = self.unrecorded.glue(i, [head for _, head in self.cuts[i]])
            reason = self._why_unscalable(i, glue, first_unrecorded)
            if reason:
                unscalable[branch.name] = reason
            outputs.extend(self._outputs_of(i, first_unrecorded))
        return tuple(outputs), unscalable

    def _output_calls(self, branch: int, first_unrecorded: Iterable[int]) -> set[Call]:
        return {self._made_by(branch, number) for number in first_unrecorded}

    def _made_by(self, branch: int, number: int) -> Call:
        """The module call that created the node and belongs to this branch alone; an outer call may serve several."""
        own = 1 << branch
        return next(c for c in self.unrecorded.outermost_of[number] if not self.unrecorded.call_need[c.index] & ~own)

    def _outputs_of(self, branch: int, first_unrecorded: Iterable[int]) -> list[BranchOutput]:
        made = {self.graph.nodes[number].sequence for number in first_unrecorded}
        users = max((self._users_outside(self._made_by(branch, n), n) for n in first_unrecorded), default=1)
        by_module: dict[str, list[int]] = {}
        places: dict[str, set[int]] = {}
        for call in self._output_calls(branch, first_unrecorded):
            same = [c.index for c in self.graph.calls if c.name == call.name]
            by_module.setdefault(call.name, []).append(same.index(call.index))
            places.setdefault(call.name, set()).update(i for i, number in enumerate(call.outputs) if number in made)
        return [
            BranchOutput(name, tuple(sorted(calls)), branch, tuple(sorted(places[name])), users)
            for name, calls in by_module.items()
        ]

    def _users_outside(self, made_by: Call, number: int) -> int:
        """How many nodes outside the module that created this one use its output."""
        inside = set(self.graph.nodes_in_call[made_by.index])
        return sum(user not in inside for user in self.graph.consumers[number])

    def _why_unscalable(self, branch: int, glue: set[int], first_unrecorded: set[int]) -> str:
        if any(self.graph.nodes[n].is_leaf for n in glue):
            return "a parameter is multiplied in outside any module"
        calls = self._output_calls(branch, first_unrecorded)
        inside = {n for call in calls for n in self.graph.nodes_in_call[call.index]}
        for number in first_unrecorded:
            for user in self.graph.consumers[number]:
                made = (self.graph.nodes_in_call[c.index] for c in calls)
                if user in inside and not any(number in nodes and user in nodes for nodes in made):
                    return "one of its last modules feeds another"
        return ""

    def _block_masks(self, branches: Sequence[Branch]) -> dict[str, int]:
        masks = Counter[str]()
        for i, branch in enumerate(branches):
            masks[branch.block] |= 1 << i
        return {block: mask for block, mask in masks.items() if block}

    def _repeated(self, blocks: Iterable[str], branch_modules: Iterable[BranchModule]) -> dict[str, str]:
        """Blocks that ran more than once in the forward, or that contain a module shared by several branches."""
        shared = {self.modules[module.name] for module in branch_modules if module.per_call}
        calls = Counter(call.name for call in self.graph.calls)
        reasons = {}
        for name in blocks:
            if calls[name] > 1:
                reasons[name] = "it runs more than once in a forward"
            elif shared.intersection(self.modules[name].modules()):
                reasons[name] = "several branches share a module in it"
        return reasons

    def _coverage(self) -> float:
        """Share of the counted FLOPs that lies in branches."""
        total = sum(self.graph.trace.flops.values())
        return sum(self.flops_by_need[1 << i] for i in range(len(self.cuts))) / total if total else 0.0

    def _check_blocks(self, branches: Sequence[Branch]) -> None:
        """Raises DiscoveryError if one block of a list has branches and another was not understood."""
        lists = {container(element_of(branch.modules)) for branch in branches} - {""}
        for name in self.names:
            if container(name) in lists and self._may_hold_branches(name):
                share = self._covered_share(name)
                if share is not None and share < COVERED_SHARE:
                    raise DiscoveryError(
                        f"Block {name} ({type(self.modules[name]).__name__}) was not understood: its residual branches "
                        f"hold {share:.0%} of its weights, at least {COVERED_SHARE:.0%} is expected. Name the "
                        "branches yourself with branches=[...], or report the architecture."
                    )

    def _may_hold_branches(self, name: str) -> bool:
        """Whether a branch may be missed: an addition is unexplained, and the block does not reshape the stream."""
        calls = [call for call in self.graph.calls if call.name == name]
        made = {n for call in calls for n in self.graph.nodes_in_call[call.index]}
        return not all(call.reshapes for call in calls) and bool(made & self.unexplained)

    def _covered_share(self, block: str) -> float | None:
        weights = [p for p in self.modules[block].parameters() if p.dim() >= 2 and id(p) in self.leaf_need]
        total = sum(p.numel() for p in weights)
        return sum(p.numel() for p in weights if self.leaf_need[id(p)] != ALWAYS_NEEDED) / total if total else None


def _totals(graph: Graph, need: Sequence[int]) -> tuple[Counter[int], Counter[int]]:
    """FLOPs and parameter elements by the set of branches that must be dropped to save them."""
    flops, elements = Counter[int](), Counter[int]()
    for node in graph.nodes:
        if node.leaf is None:
            flops[need[node.index]] += graph.trace.flops.get(node.sequence, 0)
        elif id(node.leaf) in graph.parameter_names:
            # ds_numel: all elements, even if DeepSpeed ZeRO-3 holds only a part of them here
            elements[need[node.index]] += int(getattr(node.leaf, "ds_numel", node.leaf.numel()))
    return flops, elements


def _weight_elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)
