"""Small inputs for models that describe what they take.

Models in the style of transformers have a `config` and a `main_input_name`, which is enough to build a small batch.
This module does not import transformers. For a model without these attributes, `build` raises an error that says what
to pass.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dropbp.errors import DiscoveryError
from dropbp.flops import SOUND, length_axis, shape_of

IGNORED = -100  # the label that PyTorch's cross-entropy ignores
FIRST_TOKEN = 5
MORE = 16  # tokens


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Positional and keyword arguments of one forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def as_inputs(example_inputs: Any) -> Inputs:
    """A dict gives keyword arguments, a tuple or list positional ones, anything else a single argument."""
    if isinstance(example_inputs, Mapping):
        return Inputs(kwargs=dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(args=tuple(example_inputs))
    return Inputs(args=(example_inputs,))


def longer(model: nn.Module, given: Inputs, source: bool, target: bool, more: int = MORE) -> Inputs:
    """The inputs with `more` more tokens, or twice the sound, for the encoder, the decoder, or both.

    In a model without a separate decoder the labels are as long as the source.
    """
    shape = shape_of(given.args, given.kwargs)
    s, t = shape.lengths
    two = has_decoder(model, given)

    def grown(name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or name in ("pixel_values", "images"):
            return value
        axis = length_axis(name, value)
        of_target = two and (name.startswith("decoder_") or name == "labels")
        if two and not name:
            of_target = s != t and value.shape[axis] == t
        if value.shape[axis] != (t if of_target else s) or not (target if of_target else source):
            return value
        grows = more if of_target or name not in SOUND else s
        places = torch.arange(value.shape[axis] + grows, device=value.device).clamp(max=value.shape[axis] - 1)
        return value.index_select(axis, places)

    args = tuple(grown("", value) for value in given.args)
    return Inputs(args, {name: grown(name, value) for name, value in given.kwargs.items()})


def with_other_rows(given: Inputs) -> Inputs:
    """The inputs with two rows where there is one, and with half of them where there are more."""
    rows = shape_of(given.args, given.kwargs).batch_size
    places = torch.zeros(2, dtype=torch.long) if rows == 1 else torch.arange(rows // 2)

    def taken(value: Any) -> Any:
        has_rows = isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows
        return value.index_select(0, places.to(value.device)) if has_rows else value

    return Inputs(tuple(map(taken, given.args)), {name: taken(value) for name, value in given.kwargs.items()})


def has_decoder(model: nn.Module, given: Inputs) -> bool:
    """Whether encoder and decoder may read different lengths."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return True
    shape = shape_of(given.args, given.kwargs)
    return bool(shape.target_length) or any(name.startswith("decoder_") for name in given.kwargs)


def argument_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments that the model's forward accepts by position."""
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, parameter in _parameters(model).items() if parameter.kind in places)


CallSignature = frozenset[tuple[str, Any]]


def named_arguments(names: Sequence[str], args: Sequence[Any]) -> list[tuple[str, Any]]:
    """Positional arguments with their names; an argument beyond the names gets its index."""
    return list(zip((*names, *map(str, range(len(names), len(args)))), args, strict=False))


def call_signature(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallSignature:
    """A key for a call of a model: the names of the arguments given, and the values of its flags."""
    given = (*named_arguments(names, args), *kwargs.items())
    flags = ((name, value if isinstance(value, (bool, str)) else None) for name, value in given if value is not None)
    return frozenset(flags)


def can_build(model: nn.Module) -> bool:
    """Whether the model describes what its forward takes."""
    return hasattr(model, "config") and (hasattr(model, "main_input_name") or hasattr(model, "dummy_inputs"))


def takes_text(model: nn.Module) -> bool:
    """Whether the main input is token ids."""
    return can_build(model) and getattr(model, "main_input_name", "") == "input_ids"


def build(model: nn.Module, batch_size: int = 1, sequence_length: int = 16) -> Inputs:
    """A small batch on the model's device, without labels.

    Raises DiscoveryError if the model does not describe its inputs.
    """
    if not can_build(model):
        raise DiscoveryError(
            f"{type(model).__name__} does not say what its forward takes (no `config` and `main_input_name`). Pass "
            "example_inputs=...: a dict of keyword arguments, a tuple of positional ones, or one tensor."
        )
    kwargs: dict[str, Any] = dict(_main_input(model, batch_size, sequence_length))
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in kwargs:
        kwargs["decoder_input_ids"] = _token_ids(model, batch_size, sequence_length)
    if "use_cache" in _parameters(model):
        kwargs["use_cache"] = False
    return Inputs(kwargs=kwargs)


def _main_input(model: Any, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    name = getattr(model, "main_input_name", "input_ids")
    if name == "input_ids":
        return {name: _token_ids(model, batch_size, sequence_length)}
    if name == "pixel_values":
        return {name: _pixels(model, batch_size)}
    if name == "input_features" and hasattr(model.config, "num_mel_bins"):
        frames = 2 * int(getattr(model.config, "max_source_positions", sequence_length))
        return {name: _normal(model, batch_size, int(model.config.num_mel_bins), frames)}
    if name == "input_values":
        return {name: _normal(model, batch_size, 4000)}
    return {key: value.to(device_of(model)) for key, value in model.dummy_inputs.items()}


def _token_ids(model: Any, batch_size: int, sequence_length: int) -> torch.Tensor:
    vocabulary = _vocabulary_size(model)
    first = min(FIRST_TOKEN, max(0, vocabulary - 1))
    span = max(1, min(vocabulary, 1000) - first)
    ids = first + torch.arange(batch_size * sequence_length).reshape(batch_size, sequence_length) % span
    return ids.to(device_of(model))


def _vocabulary_size(model: Any) -> int:
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return int(getattr(text, "vocab_size", None) or 100)


def _pixels(model: Any, batch_size: int) -> torch.Tensor:
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _normal(model, batch_size, int(getattr(vision, "num_channels", 3)), int(height), int(width))


def _normal(model: nn.Module, *shape: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return values.to(device_of(model), dtype)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(inner.forward).parameters
