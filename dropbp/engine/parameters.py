"""The parameters of a model, each with the branches that must all be dropped for a step to skip it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn

from dropbp.discovery.cuts import ALWAYS_NEEDED
from dropbp.discovery.structure import NO_BRANCH_ABOVE, Stem, Structure
from dropbp.lazy.grouping import ParameterGroup, split_groups, zero_fill_gradients
from dropbp.masks.plan import ForwardPlan


class Parameters:
    """Looks up parameters by name each time, because training engines replace them."""

    def __init__(self, model: nn.Module, structure: Structure, stem: Stem) -> None:
        self.model, self.structure, self.stem = model, structure, stem
        self.optimized: frozenset[str] | None = None
        self._first = frozenset(self._present())
        self.refresh()

    def refresh(self) -> None:
        """Find the parameters that were added since `enable`: to the branches' modules, as adapters are, or elsewhere.

        `unplaced` are those of which it is unknown which branches lie above them. `tied` are the names that share a
        parameter since then, each with the branches that all use it, and the lowest above any of these places, as bits.
        """
        present = self._present()
        self.tied = dict(self._tied(present))
        known = {id(present[name]) for name in self._first.intersection(present)}
        around = {module.name: functools.reduce(operator.or_, module.needs) for module in self.structure.branch_modules}
        each = {name: _around(name, around) for name, parameter in present.items() if id(parameter) not in known}
        self.added = {name: need for name, need in each.items() if need is not None}
        others = [name for name, need in each.items() if need is None]
        frozen = self.stem_parameters() if others else {}
        self.unplaced = [name for name in others if name not in frozen and not self._is_above_all(name)]

    def _tied(self, present: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, tuple[int, int]]]:
        """A parameter that had several names at `enable` is recorded by one of them."""
        lowest_above, names_of = self.structure.stem.lowest_above, dict[int, list[str]]()
        for name in filter(present.__contains__, lowest_above):
            names_of.setdefault(id(present[name]), []).append(name)
        for names in filter(lambda names: len(names) > 1, names_of.values()):
            needs = [self.structure.parameters.get(name, ALWAYS_NEEDED) for name in names]
            above = [1 << lowest_above[name] for name in names if lowest_above[name] != NO_BRANCH_ABOVE]
            if len(set(needs)) > 1 or len(set(above)) > 1:
                both = functools.reduce(operator.or_, needs), min(above, default=0)
                yield from dict.fromkeys(names, both).items()

    def _is_above_all(self, name: str) -> bool:
        """Whether no branch lies above the recorded parameters of the nearest module that has any."""
        while name:
            name = name.rpartition(".")[0]
            prefix = f"{name}." if name else ""
            beside = [branch for n, branch in self.structure.stem.lowest_above.items() if n.startswith(prefix)]
            if beside:
                return all(branch == NO_BRANCH_ABOVE for branch in beside)
        return False

    def need_of(self, name: str) -> int:
        """The branches that a parameter belongs to, as bits; `ALWAYS_NEEDED` if none."""
        if name in self.tied:
            return self.tied[name][0]
        return self.structure.parameters.get(name, self.added.get(name, ALWAYS_NEEDED))

    def needs(self) -> dict[nn.Parameter, int]:
        """The branches, as bits, that each branch parameter belongs to, without those added since `enable`."""
        return self._named(self.structure.parameters)

    def needs_now(self) -> dict[str, int]:
        """The branches, as bits, that each present parameter of a branch belongs to, by name."""
        tied = {name: need for name, (need, _) in self.tied.items()}
        return {**self.structure.parameters, **self.added, **tied}

    def branches_with_gradient(self) -> int:
        """The branches, as bits, whose parameters already have gradients from an earlier micro-batch of this step."""
        held = (need for parameter, need in self.needs().items() if parameter.grad is not None)
        return functools.reduce(operator.or_, held, 0)

    def skipped(self, plan: ForwardPlan) -> tuple[set[int], set[int], set[int]]:
        """Ids of the parameters that get no gradient under this plan: all, those in no dropped branch, and those that
        get none if they are used before a dropped branch.
        """
        present = self._present()
        unplaced = {id(present[name]) for name in self.unplaced if plan.stem_frozen and name in present}
        stem = self.stem_parameters().items() if plan.stem_frozen else ()
        frozen = {id(present[name]) for name, branch in stem if not branch & plan.trained and name in present}
        dropped = self.needs_now().items()
        inside = {id(present[name]) for name, need in dropped if not need & ~plan.dropped and name in present}
        return inside | frozen, frozen, unplaced

    def _present(self) -> dict[str, nn.Parameter]:
        """Every parameter by each of its names: inside a wrapper it has a different one."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def _named(self, *needs: Mapping[str, int]) -> dict[nn.Parameter, int]:
        """Replace names by parameters in one walk: thousands of single look-ups would take a third of a step."""
        present = self._present()
        each = ((name, need) for names in needs for name, need in names.items())
        return {present[name] if name in present else self.model.get_parameter(name): need for name, need in each}

    def restrict_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count only these as trained. If an engine has replaced the parameters, all count."""
        ids = set(map(id, parameters))
        names = frozenset(name for name, parameter in self.model.named_parameters() if id(parameter) in ids)
        self.optimized = names or None

    def trains_any(self, dropped: int) -> bool:
        """Whether a step that drops these branches still trains a parameter."""
        stem = self.stem_parameters()
        return any(
            parameter.requires_grad
            and self.need_of(name) & ~dropped
            and (self.optimized is None or name in self.optimized)
            and stem.get(name, ALWAYS_NEEDED) & ~dropped
            for name, parameter in self.model.named_parameters()
        )

    def stem_parameters(self) -> dict[str, int]:
        """Parameters outside the branches that are frozen whenever a branch is dropped, with that branch as a bit.

        Adapters that were added to such a module after `enable` are frozen with it.
        """
        tied = {name: branch for name, (_, branch) in self.tied.items() if branch and name in self.stem.lowest_above}
        found = self.stem.bits() | tied
        for path, branch in self.stem.modules.items():
            inside = (f"{path}.{name}" for name, _ in self.model.get_submodule(path).named_parameters())
            found |= {name: branch for name in inside if name not in self.stem.lowest_above}
        return found

    def grouped(self, groups: Iterable[ParameterGroup] | None) -> list[ParameterGroup]:
        """See `Handle.group_parameters`."""
        if groups is None:
            groups = [{"params": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}]
        keys: dict[int, tuple[int, int]] = {id(parameter): (0, need) for parameter, need in self.needs().items()}
        for name, branch in self.stem_parameters().items():
            keys.setdefault(id(self.model.get_parameter(name)), (1, branch))
        return split_groups(groups, lambda parameter: keys.get(id(parameter), (-1, 0)))

    def fill(self, dropped: int, with_stem: bool, boundary: Callable[[], None] | None) -> None:
        """Give zero gradients to parameters that this step skips, so that optimizers see the same set in every step.

        `boundary` is called after each branch, because a lazy device would otherwise record another graph for each
        mask.
        """
        by_need: dict[int, list[nn.Parameter]] = {}
        stem = self.stem_parameters() if with_stem else {}
        for parameter, need in self._named(self.needs_now(), stem).items():
            if not need & ~dropped and not hasattr(parameter, "ds_id"):
                by_need.setdefault(need, []).append(parameter)
        for parameters in by_need.values():
            if zero_fill_gradients(parameters) and boundary is not None:
                boundary()


def _around(name: str, modules: Mapping[str, int]) -> int | None:
    """The branches of the innermost of these modules around a parameter; None if there is none."""
    while name:
        name = name.rpartition(".")[0]
        if name in modules:
            return modules[name]
    return None
