"""Notices modules and parameters outside the branches that were added after `enable`, and replaced or tied ones.

Such a parameter may feed the residual stream below dropped branches, where no wrapper freezes it, or lie in two
branches. So may one that a new forward hook uses. The next step that drops a branch then searches its graph for it
(`dropbp.engine.stray_gradients`). The check is a few loops in C over the modules outside the branches and over the
parameters of all modules.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import nn

_get = cast(Any, dict.get)
MOST_CHANGES = 16  # an engine that replaces parameters in every step is not followed any further


class StreamCheck:
    """Compares the modules and parameters outside the branches with those of the last check.

    Args:
        model: the root module.
        branch_modules: the modules of the branches, which may get new modules and parameters.
    """

    def __init__(self, model: nn.Module, branch_modules: Iterable[nn.Module]) -> None:
        self._model, self._branch_modules = model, frozenset(branch_modules)
        self._left, self._hooks = MOST_CHANGES, list[int]()
        self._note()

    def changed(self) -> bool:
        """Whether something changed since the last call. Parameters substituted by `torch.func` do not count."""
        same = list(map(len, self._tables)) == self._sizes
        if same and all(map(operator.is_, map(_get, self._owners, self._keys), self._values)):
            return False
        if not self._left or any(map(_is_substituted, self._model.modules())):
            return False
        self._left -= 1
        self._note()
        return True

    def has_other_hooks(self) -> bool:
        """Whether a module outside the inside of branches has more or fewer forward hooks than at the last call."""
        before = self._hooks
        self._hooks = self._count_hooks()
        return before != self._hooks

    def _count_hooks(self) -> list[int]:
        return list(map(len, self._hook_tables))

    def _note(self) -> None:
        modules = (*self._outside(), *self._branch_modules)
        self._hook_tables = [table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooks = self._count_hooks()
        self._tables: list[dict[str, Any]] = [t for m in self._outside() for t in (m._modules, m._parameters)]
        self._sizes = list(map(len, self._tables))
        inside = (m._parameters for branch in self._branch_modules for m in branch.modules() if m._parameters)
        entries = [(table, key, value) for table in (*self._tables, *inside) for key, value in table.items()]
        self._owners, self._keys, self._values = ([entry[i] for entry in entries] for i in range(3))

    def _outside(self) -> Iterator[nn.Module]:
        pending, seen = [self._model], {self._model}
        while pending:
            module = pending.pop()
            yield module
            fresh = {child for child in module._modules.values() if child is not None}
            fresh -= seen | self._branch_modules
            seen |= fresh
            pending.extend(fresh)


def _is_substituted(module: nn.Module) -> bool:
    return any(value is not None and not isinstance(value, nn.Parameter) for value in module._parameters.values())
