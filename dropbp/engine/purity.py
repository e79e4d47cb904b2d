"""Evidence that a block is a pure function: a call changed nothing, and read nothing that may have changed since.

A block may run again in the backward only if that repeats its forward. Python cannot tell whether a function is pure,
so calls are observed from outside. Everything the forward can reach is recorded before and after it: buffers and
attributes of the modules, values held by classes, closures and referenced globals, random generators. A call that
changed any of these is not repeated, and neither is a call with a mutable argument, such as a cache.
"""

from __future__ import annotations

import enum
import logging
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from dropbp.tensors import tensors_in

CONSTANTS = (
    type(None), bool, int, float, complex, str, bytes, range, slice, enum.Enum,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
CODE = (
    type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, property, staticmethod,
    classmethod, logging.Logger, nn.Module,
)  # fmt: skip
CONTAINERS = (list, tuple, set, frozenset, deque)
# The checkpoint function belongs to the trainer: it runs around a block, and DropBP takes its place.
INTERNAL = frozenset(vars(nn.Module())) | {"forward", "_gradient_checkpointing_func"}
KNOWN_HOOKS = ("torch", "transformers", "accelerate", "deepspeed", "peft", "dropbp")
DEPTH = 3


def first_mutable(value: Any) -> Any:
    """The first part of an argument, other than a tensor, that a call may change or keep; None if there is none."""
    if isinstance(value, (torch.Tensor, *CONSTANTS)):
        return None
    if isinstance(value, tuple):
        return next((found for item in value if (found := first_mutable(item)) is not None), None)
    return value


def versions(values: Any) -> list[int]:
    """The version counter of each tensor, which counts in-place changes."""
    return [_version(tensor) for tensor in tensors_in(values)]


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_plain(value: Any) -> bool:
    """Whether a value is a constant, or a list or tuple of constants."""
    return isinstance(value, CONSTANTS) or (type(value) in (list, tuple) and all(map(is_plain, value)))


class Snapshot:
    """Everything a block's forward can reach besides its arguments. It keeps values alive: their ids stay unique."""

    def __init__(self, reachable: ReachableState) -> None:
        self.modes = [module.training for module in reachable.modules]
        self.parameters = [parameter for module in reachable.modules for parameter in module._parameters.values()]
        self._versions = [None if parameter is None else _version(parameter) for parameter in self.parameters]
        self.bound = reachable.bound()
        self._found: list[Any] = []
        self._seen: set[int] = set()
        self._objects: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for value in chain(self.bound, reachable.values()):
            self._add(value, DEPTH)

    def equals_but_for_parameters(self, other: Snapshot) -> bool:
        """Whether both states are equal except for the values of parameters, which an optimizer changes."""
        return _same(self.parameters, other.parameters) and _same(self._found, other._found)

    def only_rebinds(self, other: Snapshot, reachable: ReachableState) -> bool:
        """Whether this is the current state and differs from `other` only in what module attributes are bound to.

        Only plain values count, which nobody changes in place; peft stores the active adapter in such attributes.
        """
        changed = [pair for pair in zip(self.bound, other.bound, strict=False) if pair[0] is not pair[1]]
        if len(self.bound) != len(other.bound) or not all(is_plain(value) for pair in changed for value in pair):
            return False
        with reachable.rebound(other.bound):
            return Snapshot(reachable).equals_but_for_parameters(other)

    @contextmanager
    def restored(self, reachable: ReachableState) -> Iterator[None]:
        """Restore, inside the context, module attributes and plain values of other objects to this state.

        For example, after the blocks of the first batch, classifiers of transformers store the kind of the labels in
        their configuration.
        """
        changed = [
            (now, name, was)
            for now, before in self._objects
            for name, was in before.items()
            if name in now and now[name] is not was and is_plain(now[name]) and is_plain(was)
        ]
        with assigned(changed), reachable.rebound(self.bound):
            yield

    def equals(self, other: Snapshot) -> bool:
        """Whether both states are equal, values of parameters included."""
        return self._versions == other._versions and self.equals_but_for_parameters(other)

    def _add(self, value: Any, depth: int) -> None:
        self._found.append(value)
        kind = _kinds[type(value)]
        if kind is None:
            return
        if kind is torch.Tensor:
            self._found.append(_version(value))
        elif kind is torch.Generator:
            self._found.append(bytes(value.get_state().tolist()))
        elif kind is random.Random:
            self._found.append(hash(value.getstate()))
        elif depth and id(value) not in self._seen:
            self._seen.add(id(value))
            if kind is object and hasattr(value, "__dict__"):
                self._objects.append((vars(value), dict(vars(value))))
            for part in _parts(value, kind):
                self._add(part, depth - 1)


class ReachableState:
    """The places where a block's forward can store something: determined once, read before and after each call."""

    def __init__(self, block: nn.Module) -> None:
        self.modules = list(block.modules())
        self._cells: list[Any] = []
        self._own: list[tuple[dict[str, Any], tuple[str, ...]]] = []
        self._named: list[tuple[Mapping[str, Any], tuple[str, ...]]] = []
        self._functions: set[int] = set()
        for module in self.modules:
            own = vars(module)
            self._own.append((own, tuple(n for n in own if n not in INTERNAL and not n.startswith("_dropbp"))))
            self._add_function(getattr(module.forward, "__func__", module.forward))
        for kind in dict.fromkeys(kind for module in self.modules for kind in type(module).__mro__):
            if not kind.__module__.startswith("torch.") and kind is not object:
                self._add_names(vars(kind), (name for name in vars(kind) if not name.startswith("__")))

    def _add_function(self, function: Any) -> None:
        """Add the closure values and referenced globals of a function, and of the functions it wraps."""
        while isinstance(function, types.FunctionType) and id(function) not in self._functions:
            self._functions.add(id(function))
            self._cells += [cell for cell in function.__closure__ or () if not _is_code(_content(cell))]
            self._add_names(function.__globals__, function.__code__.co_names)
            function = getattr(function, "__wrapped__", None)

    def _add_names(self, values: Mapping[str, Any], names: Iterable[str]) -> None:
        kept = tuple(name for name in names if name in values and not _is_code(values[name]))
        if kept:
            self._named.append((values, kept))

    def bound(self) -> list[Any]:
        """The current values of the module attributes."""
        return [own.get(name) for own, names in self._own for name in names]

    def rebound(self, values: Sequence[Any]) -> AbstractContextManager[None]:
        """Inside the context, the module attributes have other values, as `bound` returned them."""
        places = [(own, name) for own, names in self._own for name in names]
        each = ((own, name, new) for (own, name), new in zip(places, values, strict=True))
        return assigned([(own, name, new) for own, name, new in each if name in own and own[name] is not new])

    def values(self) -> Iterator[Any]:
        """The current values in all other places."""
        for module in self.modules:
            yield from module._buffers.values()
            yield from module._modules.values()
            yield len(vars(module))
        for values, names in self._named:
            for name in names:
                yield values.get(name)
        yield from map(_content, self._cells)


@contextmanager
def assigned(values: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Inside the context, these dictionaries have other values under these keys, which they hold already."""
    before = [(table, key, table[key]) for table, key, _ in values]
    try:
        for table, key, value in values:
            table[key] = value
        yield
    finally:
        for table, key, value in before:
            table[key] = value


class _Kinds(dict[type, Any]):
    """How to inspect values of a type; None if there is nothing inside to inspect."""

    def __missing__(self, kind: type) -> Any:
        known = (torch.Tensor, torch.Generator, random.Random, dict, CONTAINERS)
        plain = issubclass(kind, (*CONSTANTS, *CODE)) or kind.__module__.partition(".")[0] == "dropbp"
        self[kind] = None if plain else next((entry for entry in known if issubclass(kind, entry)), object)
        return self[kind]


_kinds = _Kinds()


def _is_code(value: Any) -> bool:
    return isinstance(value, CODE)


def _parts(value: Any, kind: Any) -> Iterable[Any]:
    if kind is dict:
        return (*value, *value.values())
    if kind is CONTAINERS:
        return tuple(value)
    if hasattr(value, "tobytes"):  # a NumPy array
        return (value.tobytes(),)
    return tuple(getattr(value, "__dict__", {}).values())


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # still empty
        return None


def other_rng_states() -> list[Any]:
    """States of the global random generators that PyTorch's checkpointing does not restore."""
    states: list[Any] = [hash(random.getstate())]
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        _, key, position, *_ = numpy.get_state()
        states += [key.tobytes(), position]
    return states


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(_equal, one, other))


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, CONSTANTS) and bool(a == b))


def copied_buffers(block: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every buffer and a copy of its values: writes through `.data` or by a kernel do not raise the version."""
    return [(buffer, buffer.detach().clone()) for buffer in block.buffers() if not buffer.is_meta]


def any_differs(copies: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether a buffer differs from its copy."""
    return not all(torch.equal(buffer, copy) for buffer, copy in copies)


def known_side_effect(block: nn.Module) -> str | None:
    """A known side effect of each training forward of a block; None if none is known."""
    for module in block.modules():
        if isinstance(module, _NormBase) and module.track_running_stats and module.training:
            return f"{type(module).__name__} keeps running statistics"
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if module is not block and any(map(is_foreign_hook, hooks)):
            return f"a forward hook of {type(module).__name__} would run twice"
    everywhere = [*global_hooks._global_forward_pre_hooks.values(), *global_hooks._global_forward_hooks.values()]
    if any(map(is_foreign_hook, everywhere)):
        return "a global forward hook would run twice"
    return None


def is_foreign_hook(hook: Callable[..., Any]) -> bool:
    """Whether a hook belongs to none of the libraries whose hooks are safe to run twice."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] not in KNOWN_HOOKS


def temporary_obstacle(modes_at_first: int) -> str | None:
    """A circumstance of this call that may not hold in the backward; None if there is none."""
    if parametrize._cache_enabled:
        return "parametrizations are cached"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it runs under a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "it runs with forward-mode derivatives"
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return "hooks on saved tensors are disabled"
    if torch._C._len_torch_function_stack() > modes_at_first:
        return "a torch function mode is on"
    return None
