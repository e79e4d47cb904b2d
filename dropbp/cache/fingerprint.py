"""Identifies the model that a folder of states belongs to, by a fingerprint of the weights and code below a border.

States of another model, other weights, another dtype or another version have another fingerprint, so they lie in
another folder and are never found.
"""

from __future__ import annotations

import inspect
import sys
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from dropbp.cache.prefix import Prefix
from dropbp.cache.rows import content
from dropbp.errors import StateError
from dropbp.tensors import tensors_in

_ORIGIN = ("name_or_path", "commit_hash")
CHUNK = 1 << 26  # elements hashed at once, so that the host never holds a second copy of a large weight


class Fingerprints:
    """The fingerprint of each border, computed from the lowest up on demand."""

    def __init__(self, prefix: Prefix) -> None:
        self._prefix = prefix
        self._chain = [self._of_code()]

    def at(self, border: int) -> str:
        """The fingerprint of everything below a border. Raises StateError if this process does not hold the weights."""
        while len(self._chain) <= border:
            place = len(self._chain) - 1
            hashed = blake2b(self._chain[-1] + self._prefix.names[place].encode(), digest_size=16)
            for name, tensor in self._prefix.tensors_at(place):
                _update(hashed, name, tensor)
            self._chain.append(hashed.digest())
        return self._chain[border].hex()

    def forget_above(self, border: int) -> None:
        """Note that a tensor in the block above this border has changed."""
        del self._chain[border + 1 :]

    def _of_code(self) -> bytes:
        """Hash the classes with their source, the configuration, and the versions of the packages."""
        model = self._prefix.model
        kinds = sorted({type(module) for module in model.modules()}, key=lambda kind: kind.__qualname__)
        packages = sorted({kind.__module__.partition(".")[0] for kind in kinds} | {"torch"})
        versions = [f"{name} {getattr(sys.modules.get(name), '__version__', '')}" for name in packages]
        device = next(model.parameters()).device.type
        scales = [repr(getattr(module, "scaling", "")) for module in model.modules()]  # of adapters
        parts = [*versions, device, _configuration(model), *map(_source, kinds), *scales]
        return blake2b("\n".join(parts).encode(), digest_size=16).digest()


def _configuration(model: nn.Module) -> str:
    """All settings except where the model came from, and the tree of its modules."""
    settings = vars(getattr(model, "config", None) or _Nothing())
    shown = sorted(f"{name}={value!r}" for name, value in settings.items() if not name.endswith(_ORIGIN))
    return f"{shown}{model}"


def _source(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.startswith("torch."):
        return name
    try:
        return name + inspect.getsource(kind)
    except (OSError, TypeError):  # defined in an interactive session
        return name


def _update(hashed: Any, name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "ds_id") or hasattr(tensor, "device_mesh") or tensor.is_meta:
        raise StateError(f"{name} is sharded over ranks or has no data, so its folder of states is unknown")
    hashed.update(f"|{name}{tensor.dtype}{list(tensor.shape)}".encode())
    for part in (tensor, *tensors_in(list(vars(getattr(tensor, "quant_state", _Nothing())).values()))):
        for piece in part.detach().reshape(-1).split(CHUNK):
            hashed.update(content(piece.cpu()))


class _Nothing:
    """Stands for the missing scales of a tensor that is not quantised."""
