"""Exact byte counts of tensors: the same in every run, on any machine.

Allocator statistics and resident set sizes depend on the device, its caches and the rest of the process. The sizes of
the tensor storages that a backward keeps alive do not. A storage is counted when the operation that creates it returns,
until its last owner frees it. The idea of following storages by weak references from a dispatch mode is from
`torch.distributed._tools.mem_tracker`.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from dropbp._torch import compiled_code_off

TensorOwner: TypeAlias = "torch.Tensor | nn.Module | torch.optim.Optimizer"


class _Reference(weakref.ref["torch.UntypedStorage"]):
    """A weak reference that knows its storage's key after the storage is gone."""

    key: int


class TensorBytes:
    """Bytes of the tracked storages: the current total and its peak."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._live_bytes = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, _Reference] = {}
        self._freed: deque[_Reference] = deque()  # of storages that still count

    @property
    def live_bytes(self) -> int:
        """Bytes of the tracked storages that are alive now."""
        self._forget_freed()
        return self._live_bytes

    def follow(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed. A storage that is counted already gets its current size."""
        self._forget_freed()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._references:
            # No Python may run when the storage is freed: Ctrl-C in such a callback would be lost.
            self._references[key] = _Reference(storage, self._freed.append)
            self._references[key].key = key
        self._live_bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)

    def follows(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is counted."""
        self._forget_freed()
        return storage._cdata in self._references

    def _forget_freed(self) -> None:
        while self._freed:
            key = self._freed.popleft().key
            del self._references[key]
            self._live_bytes -= self._sizes.pop(key)


class _FollowNewStorages(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, tracked: TensorBytes) -> None:
        super().__init__()
        self._tracked = tracked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        older = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(outputs):
            if storage._cdata not in older or self._tracked.follows(storage):  # it may have been resized
                self._tracked.follow(storage)
        return outputs


@contextmanager
def track_tensor_bytes(*already_there: TensorOwner) -> Iterator[TensorBytes]:
    """Count the bytes of every storage created inside the context: in forward, backward and optimizer.

    Results stay bit-identical. It works on every device, the meta device included. It does not see memory that no
    operation allocates: scratch memory inside a kernel, storages resized by `UntypedStorage.resize_`, states of random
    generators (5056 bytes for each checkpoint on CPU). Functions under `torch.compile` run uncompiled inside the
    context: allocations of a compiled kernel cannot be tracked, and a function first called under a dispatch mode would
    stay uncompiled.

    Args:
        already_there: models, optimizers and tensors whose existing storages count too. Other storages created before
            never count.

    Yields:
        `TensorBytes`; read `live_bytes` and `peak_bytes` at any time, also after the context is closed.
    """
    tracked = TensorBytes()
    for storage in _owned_storages(already_there):
        tracked.follow(storage)
    with compiled_code_off(), _FollowNewStorages(tracked):
        yield tracked


def saved_tensor_bytes(fn: Callable[[], Any], *, exclude: Iterable[TensorOwner] = ()) -> int:
    """Bytes that a forward saves for its backward.

    Each storage counts once, however many of its tensors are saved. Only storages that are alive when `fn` has returned
    count; under gradient checkpointing these are the checkpoints. Not counted: parameters and their views, the storages
    of `exclude`, and tensors that a custom autograd function keeps without `save_for_backward`. It also works on the
    meta device.

    Args:
        fn: runs one forward and returns a value that keeps its graph alive: the loss, or the whole output of the model.
        exclude: models, optimizers or tensors whose storages are not activations. Pass the model, otherwise a view of a
            frozen parameter counts as an activation.

    Source: `torch.autograd.graph.saved_tensors_hooks`.
    """
    excluded = {storage._cdata for storage in _owned_storages(exclude)}
    saved: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            saved.update({storage._cdata: weakref.ref(storage) for storage in _storages(tensor)})
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = fn()
    alive = {key: storage for key, reference in saved.items() if (storage := reference()) is not None}
    del output
    return sum(storage.nbytes() for key, storage in alive.items() if key not in excluded)


def _owned_storages(owners: Iterable[TensorOwner]) -> Iterator[torch.UntypedStorage]:
    for owner in owners:
        if isinstance(owner, nn.Module):
            parameters = list(owner.parameters())
            gradients = [parameter.grad for parameter in parameters]
            yield from _storages((parameters, gradients, list(owner.buffers())))
        elif isinstance(owner, torch.optim.Optimizer):
            yield from _storages([dict(state) for state in owner.state.values()])
        else:
            yield from _storages(owner)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for tensor in [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _storages([getattr(tensor, name) for name in names])
        elif tensor.layout is torch.strided:
            yield tensor.untyped_storage()
        elif tensor.layout is torch.sparse_coo:
            yield from _storages((tensor._indices(), tensor._values()))
