"""Notices changes of plain attributes of modules: training mode, active adapters and their scaling, an epsilon.

A forward may compute something else after such a change, so rows get states of their own for each set of values. An
attribute that a forward changes itself, such as a counter of calls, is left out. The check is a few loops in C.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from hashlib import blake2b
from typing import Any, cast

from torch import nn

_INTERNAL = frozenset(vars(nn.Module())) - {"training"}
_DEPTH = 3
MOST_NUMBERS = 16  # values of an attribute; more come from a schedule
_get = cast(Any, dict.get)


class PlainAttributes:
    """The numbers, strings and containers of these that modules have as attributes; `modules` are given by name.

    Those `around` the blocks may count steps or choose blocks, so of these only the training mode counts. `scheduled`
    names an attribute with a number that keeps changing; empty if there is none.
    """

    def __init__(self, modules: Mapping[str, nn.Module], around: Container[str] = ()) -> None:
        self._modules, self._around, self._left_out = modules, around, set[str]()
        self._marks, self._new_numbers = set[bytes](), Counter[str]()
        self.scheduled = ""
        self._note()

    def mark(self) -> bytes:
        """A mark that differs whenever a value does."""
        if not self._same():
            before = dict(zip(self._names, self._values, strict=True))
            self._note()
            self._look_for_schedules(before)
        return self._mark

    def leave_out_changed(self) -> None:
        """Leave out the attributes that changed since the last `mark`: a forward in between has changed them."""
        if not self._same():
            before = dict(zip(self._names, self._values, strict=True))
            self._left_out |= {name for name, _, _, value in self._found() if before.get(name, self) != value}
            self._note()

    def _same(self) -> bool:
        try:
            same = list(map(_get, self._tables, self._keys)) == self._values
        except (RuntimeError, ValueError):  # an array or tensor has taken the place of a number
            return False
        return same and list(map(len, self._owners)) == self._sizes

    def _note(self) -> None:
        found = list(self._found())
        self._names, self._tables = [entry[0] for entry in found], [entry[1] for entry in found]
        self._keys, self._values = [entry[2] for entry in found], [entry[3] for entry in found]
        self._owners = [vars(module) for module in self._modules.values()]
        self._sizes = list(map(len, self._owners))
        self._mark = blake2b(repr(self._values).encode(), digest_size=16).digest()

    def _found(self) -> Iterator[tuple[str, dict[str, Any], str, Any]]:
        """Name, dictionary, key and a copy of the value of each attribute."""
        for path, module in self._modules.items():
            for key, value in vars(module).items():
                name, counts = f"{path}.{key}".lstrip("."), path not in self._around or key == "training"
                if counts and key not in _INTERNAL and name not in self._left_out and _is_plain(value):
                    yield name, vars(module), key, value if isinstance(value, _SINGLE) else copy.deepcopy(value)

    def _look_for_schedules(self, before: Mapping[str, Any]) -> None:
        if self._mark in self._marks:
            return
        self._marks.add(self._mark)
        for name, value in zip(self._names, self._values, strict=True):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and before.get(name) != value:
                self._new_numbers[name] += 1
                if self._new_numbers[name] > MOST_NUMBERS:
                    self.scheduled = name


_SINGLE = (bool, int, float, complex, str, type(None))


def _is_plain(value: Any, depth: int = _DEPTH) -> bool:
    if isinstance(value, _SINGLE):
        return True
    if type(value) is dict:
        return depth > 0 and all(isinstance(key, _SINGLE) and _is_plain(v, depth - 1) for key, v in value.items())
    return type(value) in (list, tuple) and depth > 0 and all(_is_plain(v, depth - 1) for v in value)
