"""Puts functions around the forward of single module instances, and removes them without a trace.

Only the instance changes: its `__dict__` gets a bound method `forward` and one attribute that the function reads.
Classes are never patched. Hooks are not used, because they slow every call and callers of `forward` skip them. Names
and `state_dict` keys stay. Copies and pickles of the model are plain: the attribute copies to None, which makes the
function pass calls through, and the method binds to the copy.
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


class Attachment:
    """What an intercepted forward reads. It belongs to one model: its copies and pickles are None.

    `original` is the forward it was put around. A function that finds an attachment with another one is a leftover,
    inside someone else's wrapper or in a copy, and lets calls pass.
    """

    __slots__ = ("original",)

    original: Forward

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


class Interception:
    """One function around one module's forward.

    Args:
        module: the instance.
        attribute: name of the instance attribute that holds `attachment`.
        attachment: what the function needs to know.
        wrap: from the original forward, as a function of `(module, *args, **kwargs)`, makes the new one.
    """

    def __init__(
        self, module: nn.Module, attribute: str, attachment: Attachment, wrap: Callable[[Forward], Forward]
    ) -> None:
        self.module, self.attribute = module, attribute
        self.before = {key: module.__dict__.get(key, _MISSING) for key in ("forward", attribute)}
        attachment.original = _unbound_forward(module)
        self.method = types.MethodType(_wrapped(attachment.original, wrap), module)
        module.__dict__[attribute] = attachment
        module.__dict__["forward"] = self.method

    def remove(self) -> None:
        """Restore the module's forward; if something has wrapped ours since, ours passes calls on."""
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
    """One function for all modules of a class: less in the processor's caches, less for a compiler to tell apart."""
    key = wrap, id(original)  # a function holds what it is around, so while it lives the number is taken
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
    """Bound methods are pickled by name, and `forward` is the name a plain model answers to."""
    forward.__name__ = "forward"
    return forward
