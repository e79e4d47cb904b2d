"""What lies below each border, and the reasons not to store states there.

Border `k` lies after the first `k` blocks. A state stored there is valid as long as no parameter and no buffer below
has changed. The coming masks tell which of them may still train. Whether one has changed is read from PyTorch's version
counters, at every forward.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from dropbp.cache.attributes import PlainAttributes
from dropbp.discovery.module_paths import prefixes
from dropbp.discovery.structure import NO_BRANCH_ABOVE, Structure
from dropbp.engine.purity import is_foreign_hook
from dropbp.tensors import tensors_in

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_get = cast(Any, dict.get)


class Prefix:
    """The blocks of one model in the order in which they run, and the tensors below each border.

    `freezes_stem` says whether the stem is frozen in steps that drop a branch above it.
    """

    def __init__(self, model: nn.Module, structure: Structure, freezes_stem: bool) -> None:
        self.model, self._structure, self._freezes_stem = model, structure, freezes_stem
        modules = {model.get_submodule(name): name for name in structure.blocks}
        self.names, self.blocks = list(modules.values()), list(modules)
        self._inside = [list(_called(block)) for block in self.blocks]
        self._norms = [[each for each in inside if isinstance(each, _NormBase)] for inside in self._inside]
        self._feeding: dict[str, nn.Module] = {}  # modules outside the blocks that come before some branch
        self._tensors = sorted(self._found(), key=lambda entry: entry[0])
        self._places = [entry[0] for entry in self._tensors]
        self._tables, self._keys = ([entry[i] for entry in self._tensors] for i in (1, 2))
        called = {name: module for name, module in model.named_modules() if type(module) not in _CONTAINERS}
        around = {"", *(path for name in self.names for path in prefixes(name)[:-1])}
        self.attributes = PlainAttributes(called, around)
        self._seen: list[Any] = []
        self._requires_grad: list[bool] = []
        self._trained: list[tuple[int, int, bool]] = []

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def _found(self) -> Iterator[tuple[int, dict[str, Any], str, str]]:
        """Each parameter and buffer that may be below a border: index of its block, dictionary and key that hold it,
        name.

        Outside the blocks, everything that comes before some branch counts as below the first block.
        """
        lowest_above = self._structure.stem.lowest_above
        places = {id(module): place for place, block in enumerate(self.blocks) for module in block.modules()}
        for path, module in self.model.named_modules():
            place = places.get(id(module))
            for key in module._parameters:
                name = f"{path}.{key}".lstrip(".")
                if place is not None or lowest_above.get(name, 0) != NO_BRANCH_ABOVE:
                    self._feeding |= {} if place is not None else {path: module}
                    yield place or 0, module._parameters, key, name
            for key in module._buffers if place is not None else ():
                yield place or 0, module._buffers, key, ""

    def tensors_at(self, place: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters and buffers of one block, with their names; the first has those of the modules that feed it."""
        start, end = (bisect_left(self._places, each) for each in (place, place + 1))
        for _, table, key, name in self._tensors[start:end]:
            tensor = table.get(key)
            if tensor is not None:
                yield name or key, tensor

    def free_states(self, optimizer: torch.optim.Optimizer, border: int) -> int:
        """Free the states that an optimizer holds of the trained tensors below a border; return their bytes."""
        below = (tensor for place in range(border) for _, tensor in self.tensors_at(place))
        idle = [t for t in below if t.requires_grad and t.grad is None and t in optimizer.state]
        return sum(value.nbytes for tensor in idle for value in tensors_in(optimizer.state.pop(tensor, {})))

    def current_tensors(self) -> list[Any]:
        """The current tensors before a forward, None for a missing one. Notes which of them train."""
        tensors = list(map(_get, self._tables, self._keys))
        requires_grad = [tensor is not None and tensor.requires_grad for tensor in tensors]
        if requires_grad != self._requires_grad:
            self._requires_grad = requires_grad
            self._trained = sorted(set(self._training()))
        return tensors

    def _training(self) -> Iterator[tuple[int, int, bool]]:
        """For each trained parameter: its block, the lowest branch above it, whether it is in the stem."""
        stem = self._structure.stem
        for (place, _, _, name), requires_grad in zip(self._tensors, self._requires_grad, strict=True):
            if name and requires_grad:
                yield place, stem.lowest_above.get(name, 0), name in stem.names

    def changed(self, tensors: Sequence[Any], border: int) -> int | None:
        """The lowest block below a border with a changed tensor since the last call; None if there is none.

        `tensors` are the `current_tensors`. One checked for the first time counts as unchanged, since no state was
        stored above it before.
        """
        storage_fixed = not hasattr(self.model, "set_unshard_in_backward")  # FSDP2 gathers what it holds at the root
        below = bisect_left(self._places, border)
        now = [_version_mark(tensor, storage_fixed) for tensor in tensors[:below]]
        before, self._seen = self._seen, now + self._seen[below:]
        if before[:below] == now:
            return None
        return next((place for place, new, old in zip(self._places, now, before, strict=False) if new != old), None)

    def frozen_border(self, kept: int, freezes_stem: bool) -> int:
        """The highest border below which nothing trains in steps that keep the branches `kept` (bits).

        `freezes_stem` says whether the stem below the lowest of them is frozen.
        """
        for place, branch, in_stem in self._trained:
            if branch == NO_BRANCH_ABOVE or (in_stem and not freezes_stem) or kept >> branch & 1:
                return place
        return self.count

    def modes(self) -> bytes:
        """A mark of what a call may switch temporarily: training modes, adapters, and other plain attributes."""
        return self.attributes.mark()

    def objection(self, border: int) -> str | None:
        """Why states at a border must not be used; None if no reason is known."""
        if self.attributes.scheduled:
            return f"{self.attributes.scheduled} keeps changing, so that a row's state may differ each time"
        for name, modules, norms in zip(self.names[:border], self._inside, self._norms, strict=False):
            for norm in norms:
                if norm.training:
                    return f"{name} holds a {type(norm).__name__}, which uses statistics of the whole batch"
            for module in [each for each in modules if each._forward_pre_hooks or each._forward_hooks]:
                if _has_foreign_hooks(module):
                    return f"a hook is registered on {type(module).__name__} in {name}, and would not be called"
        for path, module in self._feeding.items():
            if _has_foreign_hooks(module):
                return f"a hook is registered on {path}, and may change what enters the blocks"
        everywhere = [*global_hooks._global_forward_pre_hooks.values(), *global_hooks._global_forward_hooks.values()]
        if any(map(is_foreign_hook, everywhere)):
            return "a global forward hook is registered, and would not be called for every module"
        return None

    def random_module(self, place: int) -> str:
        """The module that draws random numbers in a block, as far as its attributes tell."""
        named = [("", self.model)] if place < 0 else list(self.blocks[place].named_modules())
        dropouts = (name for name, module in named if isinstance(module, _DropoutNd) and module.p)
        found = next(dropouts, "")
        where = self.names[place] if place >= 0 else "what feeds the first block"
        return f"{where}.{found}" if found else where


def _has_foreign_hooks(module: nn.Module) -> bool:
    return any(map(is_foreign_hook, (*module._forward_pre_hooks.values(), *module._forward_hooks.values())))


def _called(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that may run, without lists and dicts, which make up half of the modules of a model with adapters."""
    return (module for module in model.modules() if type(module) not in _CONTAINERS)


def _version_mark(tensor: torch.Tensor | None, storage_fixed: bool) -> tuple[Any, ...] | None:
    """A mark that changes when a tensor changes; `storage_fixed`: its storage does not move."""
    if tensor is None:
        return None
    version = 0 if tensor.is_inference() else tensor._version
    plain = storage_fixed and type(tensor) in (nn.Parameter, torch.Tensor)
    return (id(tensor), version, tensor.data_ptr() if plain else 0)
