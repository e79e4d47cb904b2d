"""Identifies rows of a batch by their content: the same row has the same key in any order, batch, padding and process.

A key is a hash of everything that a row's hidden states may depend on: its own part of every tensor with rows, all
other inputs as a whole, and what `salt` adds (modes, autocast). Labels are left out if they are only used for the loss.
A padding mask, as tokenizers make it, tells which positions are real: only these are hashed, and only their states are
stored.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from dropbp.engine.purity import CONSTANTS
from dropbp.flops import shape_of
from dropbp.inputs import IGNORED, argument_names, named_arguments

MASK = "attention_mask"
LABELS = frozenset({
    "labels", "label", "label_ids", "shift_labels", "start_positions", "end_positions", "next_sentence_label",
    "num_items_in_batch", "logits_to_keep", "use_cache", "return_dict", "return_loss",
})  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One row: the key of its content, and its real positions (None: all count, or it is unknown).

    `padding` is the key of the padding just left of them, from whose state the first token is predicted; None if there
    is none.
    """

    key: bytes
    real: slice | None
    padding: bytes | None = None

    def at(self, border: int) -> bytes:
        """The key of the padding's state at a border; each border has its own."""
        return (self.padding or b"") + border.to_bytes(2, "big")


class Keys:
    """Makes the keys of rows.

    `names` are those of the forward's positional arguments. `labels_matter` if labels are inputs too, as for a decoder
    that reads them; `length_matters` if a state depends on the length of the padded row. `trims` says whether padding
    is left out: not if the stream has other positions than the mask. While `offset_matters`, a state may depend on the
    padding to its left, and rows are hashed with it.
    """

    def __init__(self, names: Sequence[str], labels_matter: bool, length_matters: bool) -> None:
        self._names, self._labels_matter, self._length_matters = tuple(names), labels_matter, length_matters
        self.trims = self.offset_matters = True

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any], salt: str) -> list[Row] | None:
        """The rows of a batch; None if an input cannot be hashed or requires a gradient."""
        given = dict(_flat([*named_arguments(self._names, args), *kwargs.items()]))
        if not self._labels_matter:
            given = {name: value for name, value in given.items() if name.partition("/")[0] not in LABELS}
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor)}
        if not tensors or any(t.requires_grad or t.is_meta or t.layout != torch.strided for t in tensors.values()):
            return None
        if not all(isinstance(value, CONSTANTS) for value in others.values()):
            return None
        rows = shape_of(args, kwargs).batch_size
        here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        flags = sorted((name, repr(value)) for name, value in others.items() if value is not None)
        shared = blake2b(f"{salt}|{flags}".encode(), digest_size=KEY_BYTES)
        own = {name: t for name, t in sorted(here.items()) if _has_rows(t, rows)}
        for name in sorted(here.keys() - own.keys()):
            _update(shared, name, here[name])
        labels = kwargs.get("labels")
        labels = labels.detach().cpu() if isinstance(labels, torch.Tensor) and labels.shape[:1] == (rows,) else None
        return [self._row(row, own, labels, shared.copy()) for row in range(rows)]

    def _row(self, row: int, own: Mapping[str, torch.Tensor], labels: torch.Tensor | None, hashed: Any) -> Row:
        parts = {name: tensor[row if tensor.shape[0] > 1 else 0] for name, tensor in own.items()}
        mask = parts.get(MASK)
        real = self._real(mask, None if labels is None else labels[row])
        if mask is None or real is None:
            for name, part in parts.items():
                _update(hashed, name, part)
            return Row(hashed.digest(), None)
        if self._length_matters:
            hashed.update(str(len(mask)).encode())
        padding = hashed.copy()
        padding.update(b"padding")
        for name, part in parts.items():
            follows = part.shape[:1] == mask.shape and not name.startswith("decoder_")
            _update(hashed, name, part[real] if follows else part)
            _update(padding, name, part[max(0, real.start - 1)] if follows else part)
        return Row(hashed.digest(), real, padding.digest() if real.start else None)

    def _real(self, mask: torch.Tensor | None, labels: torch.Tensor | None) -> slice | None:
        """The real positions of one row, if they are contiguous and no output of the other positions is used."""
        if not self.trims or mask is None or mask.dim() != 1:
            return None
        places = mask.nonzero()
        if not len(places):
            return None
        first, last = int(places[0]), int(places[-1])
        if last - first + 1 != len(places) or (first and self.offset_matters):
            return None
        if labels is not None and labels.shape == mask.shape and bool((labels[mask == 0] != IGNORED).any()):
            return None
        return slice(first, last + 1)


def keys_of(model: nn.Module) -> Keys:
    """What makes the keys of this model's rows."""
    reads_labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return Keys(argument_names(model), reads_labels, _length_matters(model))


def _length_matters(model: nn.Module) -> bool:
    """Whether rotary positions are scaled by the length of the padded batch."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rotary = str([getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")])
    return any(word in rotary for word in ("dynamic", "longrope"))


KEY_BYTES = 24


def _flat(entries: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Entries of nested mappings and lists, named by their path: some models take a mask for each kind of layer."""
    for name, value in entries:
        if isinstance(value, Mapping):
            yield from _flat((f"{name}/{key}", item) for key, item in value.items())
        elif isinstance(value, (list, tuple)):
            yield from _flat((f"{name}/{place}", item) for place, item in enumerate(value))
        else:
            yield name, value


def _has_rows(tensor: torch.Tensor, rows: int) -> bool:
    """Whether the tensor has a part for each row; a single part counts for all rows."""
    return (tensor.dim() > 0 and tensor.shape[0] == rows) or (tensor.dim() > 1 and tensor.shape[0] == 1)


def _update(hashed: Any, name: str, tensor: torch.Tensor) -> None:
    hashed.update(f"|{name}{tensor.dtype}{list(tensor.shape)}".encode())
    hashed.update(content(tensor))


def padded_on_the_left(mask: Any) -> bool:
    """Whether a padding mask leaves out the first position of a row."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())


def content(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor on the CPU."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
