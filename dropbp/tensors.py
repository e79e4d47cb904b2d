"""Tensors inside the nested values that modules take and return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

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
    """Whether autograd can follow tensors of this type."""
    return x.is_floating_point() or x.is_complex()


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
