"""A device that PyTorch does not know, made with its own means for devices of other packages (PrivateUse1).

A tensor of the device has sizes, strides, an autograd graph and a storage without data. The data lies in a flat tensor
on the CPU, filed under the storage, and every operator runs there. `register` works once in a process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "chip"
_data: dict[int, torch.Tensor] = {}
_libraries: list[torch.library.Library] = []


class Module(backend_registration._DummyBackendModule):
    """What is found as `torch.chip`; it says nothing of memory."""


class Telling(Module):
    """A module that also tells how much memory lives."""

    def memory_allocated(self, device: Any = None) -> int:
        return sum(flat.nbytes for flat in _data.values())


def register(module: Module | None = None) -> None:
    """Make `torch.device("chip")` work in this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, module or Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(_on_cpu, "PrivateUse1")
    _libraries.append(library)


def _on_cpu(operator: Any, *args: Any, **kwargs: Any) -> Any:
    schema = operator._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args, strict=False)} | kwargs
    if operator is torch.ops.aten._copy_from.default:
        _unwrapped(given["dst"]).copy_(_unwrapped(given["self"]))
        return given["dst"]
    raw = {name: tree_map(_unwrapped, value) for name, value in given.items()}
    result = operator(**raw)
    if given.get("device") is not None and torch.device(given["device"]).type == "cpu":
        return result
    written = [each.name for each in schema if each.alias_info is not None and each.alias_info.is_write]
    for name in written:
        if raw[name].shape != given[name].shape:
            given[name].data = _wrapped(raw[name])
    if written:
        return given[written[0]] if len(written) == 1 else tuple(given[name] for name in written)
    return tree_map(_wrapped, result)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, torch.Tensor) or value.device.type != NAME:
        return value
    return _data[value.untyped_storage()._cdata].as_strided(value.shape, value.stride(), value.storage_offset())


def _wrapped(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    tensor = torch._C._acc.create_empty_tensor(tuple(value.shape), value.dtype)  # type: ignore[attr-defined]
    _data[tensor.untyped_storage()._cdata] = value.contiguous().view(-1)
    return tensor
