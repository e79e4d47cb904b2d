"""Tensors inside the nested values that modules take and return."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

TensorMap = Callable[[torch.Tensor], torch.Tensor]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside nested lists, tuples, dicts, dataclasses and output objects."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def is_differentiable(x: torch.Tensor) -> bool:
    """Whether tensors of this dtype can require a gradient."""
    return x.is_floating_point() or x.is_complex()


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that all ranks agree on, if each holds a shard of it (DTensor); else the tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_output(output: Any, args: Any) -> Any:
    """The output; a view of it if it is one of the arguments, so that it has an autograd node of its own."""
    is_argument = isinstance(output, torch.Tensor) and any(output is tensor for tensor in tensors_in(args))
    return output.view_as(output) if is_argument and output.requires_grad else output


def outputs_by_key(value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point tensor of a model's outputs, with the name or index of its output.

    Indices in lists inside an output are left out: another number of layers or images is not another kind of output.
    """
    for key, output in _entries(value):
        for tensor in tensors_in(output):
            if is_differentiable(tensor):
                yield key, tensor


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return ((str(key), item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", range(len(value)))
        return ((str(name), item) for name, item in zip(names, value, strict=True))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return iter([("output", value)])


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_LONG_LIST = 1000


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that not every module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def held_by_modules(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating-point tensors that are attributes of modules but neither parameters nor buffers, with their names."""
    for name, module in model.named_modules():
        for attribute, value in own_attributes(module).items():
            for tensor in tensors_in(value) if _may_hold_tensors(value) else ():
                if tensor.is_floating_point():
                    yield f"{name}.{attribute}".lstrip("."), tensor


def _may_hold_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return len(value) < _LONG_LIST
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def buffers_restored(model: nn.Module) -> Iterator[None]:
    """Restore all buffers afterwards: kernels update running statistics without raising the tensor's version."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def map_tensors(value: Any, function: TensorMap) -> Any:
    """`value` with `function` applied to each differentiable tensor in nested tuples, lists, dicts and objects."""
    if isinstance(value, torch.Tensor):
        return function(value) if is_differentiable(value) else value
    if isinstance(value, Mapping):
        return _map_mapping(value, function)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _map_dataclass(value, function)
    return value


def _map_mapping(value: Any, function: TensorMap) -> Any:
    changed = copy.copy(value)
    for key, item in value.items():
        changed[key] = map_tensors(item, function)
    return changed


def _map_dataclass(value: Any, function: TensorMap) -> Any:
    changed = copy.copy(value)
    for field in dataclasses.fields(value):
        object.__setattr__(changed, field.name, map_tensors(getattr(value, field.name), function))
    return changed


def any_requires_grad(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the arguments of a forward, key-value caches included, hold a tensor that requires a gradient."""
    values = [*args, *kwargs.values()]
    if any(tensor.requires_grad for tensor in tensors_in(values)):
        return True
    return any(_cache_requires_grad(value) for value in values if hasattr(value, "get_seq_length"))


def _cache_requires_grad(cache: Any) -> bool:
    """Handles the caches of transformers: objects that hold tensors, or lists of objects that do."""
    inside = list(vars(cache).values())
    inside += [
        vars(layer) for value in inside if isinstance(value, list) for layer in value if hasattr(layer, "__dict__")
    ]
    inside += [vars(value) for value in inside if hasattr(value, "get_seq_length") and value is not cache]
    return any(tensor.requires_grad for tensor in tensors_in(inside))
