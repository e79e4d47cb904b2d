"""Checks that nothing has replaced a branch since `enable`, as adapters, quantisers and patches may.

The wrapper around the forward of its last module drops a branch. If that module is taken out of the model, or its
forward is overwritten, the wrapper is no longer called, and the branch would train although it is dropped. So every
training forward first checks the path from the root to each of these modules, and their forwards. The check is two
loops in C, which take 30 to 150 µs for 160 branches, depending on the processor's caches. Wrappers that only forward
calls are allowed.
"""

from __future__ import annotations

import functools
import itertools
import operator
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from dropbp.discovery.structure import Structure
from dropbp.errors import StateError

Step = tuple[nn.Module, str, nn.Module]  # parent, key, child
ModulePath = list[Step]

_ADVICE = (
    "Add adapters, quantise, patch and wrap first and enable last: handle.remove(), then dropbp.enable(model, ...)."
)


def last_modules(structure: Structure) -> list[str]:
    """The modules whose forwards drop the branches; for a branch whose last module is unknown, all its modules."""
    found: dict[str, None] = {}
    for number, branch in enumerate(structure.branches):
        outputs = [entry.module for entry in structure.branch_outputs if entry.branch == number]
        ends = [name for name in branch.modules if any(f"{end}.".startswith(f"{name}.") for end in outputs)]
        found |= dict.fromkeys(ends or branch.modules)
    return list(found)


def refuse_per_sample_gradients(model: nn.Module) -> None:
    """Raises StateError if opacus collects the gradients of single rows: it asks for those of every parameter."""
    if any(hasattr(parameter, "grad_sample") for parameter in model.parameters()):
        raise StateError(
            f"opacus collects a gradient of each row for every parameter of {type(model).__name__}, and the parameters "
            "of dropped branches have none. Train without DropBP (handle.remove()), or without opacus "
            "(to_standard_module() of its GradSampleModule)."
        )


class PatchCheck:
    """Checks that the branches' last modules are still in place, with the forwards that `enable` gave them."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self._paths = [list(_steps_to(model, name)) for name in names if name]
        self._ours: dict[nn.Module, Any] = {path[-1][2]: path[-1][2].__dict__["forward"] for path in self._paths}
        self._forwards = dict(self._ours)
        self._note(self._paths)

    def check(self) -> None:
        """Compare the model with the last known state, and inspect what differs.

        Raises StateError if a module was replaced, or its forward overwritten; the message names it.
        """
        here = all(map(operator.is_, map(dict.get, self._tables, self._keys), self._children))
        if here and all(map(operator.is_, map(dict.get, self._owners, itertools.repeat("forward")), self._calls)):
            return
        paths = [self._present(path) for path in self._paths]
        for path in self._paths:
            self._check_forward(path)
        self._note(paths)

    def _note(self, paths: list[ModulePath]) -> None:
        """Store the state in the form that compares fastest: every step of all paths once."""
        steps = {(id(parent), key): (parent._modules, key, child) for path in paths for parent, key, child in path}
        self._tables: list[dict[str, nn.Module | None]] = [table for table, _, _ in steps.values()]
        self._keys = [key for _, key, _ in steps.values()]
        self._children = [child for _, _, child in steps.values()]
        self._owners = [module.__dict__ for module in self._forwards]
        self._calls = list(self._forwards.values())

    def _present(self, path: ModulePath) -> ModulePath:
        """The current path to the same module, through wrappers that were inserted."""
        found = []
        for place, (parent, key, child) in enumerate(path):
            new = parent._modules.get(key)
            if new is child:
                found.append((parent, key, child))
            elif new is not None and _passes_on(new, child):
                inside = next(name for name, module in new.named_modules() if module is child)
                found += [(parent, key, new), *_steps_to(new, inside)]
            else:
                raise StateError(_replacement_message(self.model, path, place, new))
        return found

    def _check_forward(self, path: ModulePath) -> None:
        module = path[-1][2]
        forward = module.__dict__.get("forward")
        if not _contains_wrapper(forward, self._ours[module], module):
            raise StateError(
                f"The forward of {_name(path)} in {type(self.model).__name__} was replaced after dropbp.enable by one "
                f"that does not call it ({_short(forward)}), so its backward would not be skipped. {_ADVICE}"
            )
        self._forwards[module] = forward


def _steps_to(root: nn.Module, name: str) -> Iterator[Step]:
    """Parent, key and child of every step from the root to a module."""
    parent = root
    for key in filter(None, name.split(".")):
        child = parent._modules[key]
        assert child is not None
        yield parent, key, child
        parent = child


def _name(path: ModulePath) -> str:
    return ".".join(key for _, key, _ in path)


def _passes_on(new: nn.Module, old: nn.Module) -> bool:
    """Whether the new module contains the old one and trains no parameters of its own."""
    known = set(old.parameters())
    trains_more = any(parameter.requires_grad and parameter not in known for parameter in new.parameters())
    return not trains_more and any(module is old for module in new.modules())


def _replacement_message(model: nn.Module, path: ModulePath, place: int, new: nn.Module | None) -> str:
    name, old = _name(path[: place + 1]), path[place][2]
    holds = new is not None and any(module is old for module in new.modules())
    if new is None:
        what = "was taken out after dropbp.enable"
    elif holds:
        what = f"was wrapped after dropbp.enable by {type(new).__name__}, which trains parameters of its own"
    else:
        what = f"was replaced after dropbp.enable: {type(old).__name__} by {type(new).__name__}"
    return f"{name} in {type(model).__name__} {what}, so the backward of {_name(path)} would not be skipped. {_ADVICE}"


def _contains_wrapper(forward: Any, ours: types.MethodType, module: nn.Module) -> bool:
    """Whether a forward is ours or refers to it: as a wrapped function, in a closure, or on the module (accelerate)."""
    unseen, seen = [forward, *(value for key, value in module.__dict__.items() if key != "forward")], set[int]()
    while unseen:
        function = unseen.pop()
        if function is ours or function is ours.__func__:
            return True
        if id(function) not in seen:
            seen.add(id(function))
            unseen += _inside(function)
    return False


def _inside(function: Any) -> list[Any]:
    if isinstance(function, types.MethodType):
        return [function.__func__]
    if isinstance(function, functools.partial):
        return [function.func, *function.args, *function.keywords.values(), getattr(function, "__wrapped__", None)]
    if isinstance(function, types.FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        return [*cells, *(function.__defaults__ or ()), getattr(function, "__wrapped__", None)]
    return []


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _short(forward: Any) -> str:
    return str(getattr(forward, "__qualname__", type(forward).__name__))
