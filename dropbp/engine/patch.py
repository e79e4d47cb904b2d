"""Wraps the forward of single module instances, and removes the wrappers without a trace.

Only the instance changes: its `__dict__` gets a bound method `forward` and one attribute that the wrapper reads.
Classes are never patched. Hooks are not used: they slow every call, and code that calls `forward` directly skips them.
Names and `state_dict` keys do not change. Copies and pickles of the model are plain: the attribute copies to None,
which makes the wrapper forward all calls, and the method binds to the copy.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]
_MISSING = object()
_functions: weakref.WeakValueDictionary[tuple[Any, int], Forward] = weakref.WeakValueDictionary()


class WrapperState:
    """The data that a wrapper reads. It belongs to one model: in copies and pickles it becomes None.

    `original` is the wrapped forward. A wrapper that finds a state with another `original` is a leftover, inside
    a foreign wrapper or in a copy, and only forwards calls.
    """

    __slots__ = ("original",)

    original: Forward

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class ForwardPatch:
    """A wrapper around one module's forward; it reads `state` from the instance attribute of this name.

    `wrap` makes it from the original forward, a function of `(module, *args, **kwargs)`.
    """

    def __init__(
        self, module: nn.Module, attribute: str, state: WrapperState, wrap: Callable[[Forward], Forward]
    ) -> None:
        self.module, self.attribute = module, attribute
        self.before = {key: module.__dict__.get(key, _MISSING) for key in ("forward", attribute)}
        state.original = _unbound_forward(module)
        self.method = types.MethodType(_wrapped(state.original, wrap), module)
        module.__dict__[attribute] = state
        module.__dict__["forward"] = self.method

    def remove(self) -> None:
        """Restore the module's forward. If another wrapper was put around ours since, ours stays and forwards calls."""
        own = self.module.__dict__
        if own.get("forward") is not self.method:
            own[self.attribute] = None
            return
        for key, value in self.before.items():
            if value is _MISSING:
                del own[key]
            else:
                own[key] = value


def _wrapped(original: Forward, wrap: Callable[[Forward], Forward]) -> Forward:
    """One wrapper for all modules of a class, which saves cache misses and gives a compiler less to distinguish."""
    key = wrap, id(original)  # the wrapper keeps `original` alive, so the id stays unique while it lives
    function = _functions.get(key)
    if function is None:
        function = _functions[key] = wrap(original)
    return function


def _unbound_forward(module: nn.Module) -> Forward:
    current = module.__dict__.get("forward")
    if current is None:
        return type(module).forward
    if isinstance(current, types.MethodType) and current.__self__ is module:
        return current.__func__
    return _ignoring_self(current)


def _ignoring_self(function: Forward) -> Forward:
    @functools.wraps(function)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return forward


def named_forward(forward: Forward) -> Forward:
    """Name it `forward`: pickle stores bound methods by name, and a plain model has a method of that name."""
    forward.__name__ = "forward"
    return forward
