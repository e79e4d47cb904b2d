"""`discover`: the residual branches of a model and their FLOPs for any shape, with the model left as it is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from dropbp import inputs as example
from dropbp.checks import listed, short
from dropbp.discovery.record import record
from dropbp.discovery.structure import Branch, Structure, analyse, analyse_named
from dropbp.errors import ConfigError, DiscoveryError
from dropbp.flops import FlopsModel, Shape, counted_once, fitted, shape_of

logger = logging.getLogger(__name__)

Names = Sequence[str | Sequence[str]]
SHORT, LONG = 16, 32


@dataclass(frozen=True)
class Findings:
    """What the recording of one small forward (two, for text) tells about a model.

    Attributes:
        structure: the branches and all that is done when they are dropped.
        flops: of each branch, for any shape.
        shape: for which they were counted.
    """

    structure: Structure
    flops: FlopsModel
    shape: Shape

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches with their FLOPs for the shape counted."""
        counts = self.flops.at(self.shape)
        return tuple(replace(b, flops=f) for b, f in zip(self.structure.branches, counts, strict=True))


def discover(model: nn.Module, example_inputs: Any = None, branches: Names | None = None) -> tuple[Branch, ...]:
    """The residual branches of a model, nearest the input first; the model is not changed.

    Raises:
        DiscoveryError: none was found, a block was not understood, or the forward needs `example_inputs`.
    """
    return find(unwrapped(checked_module(model)), example_inputs, branches).branches


def find(model: nn.Module, example_inputs: Any, named: Names | None) -> Findings:
    """What `discover` and `enable` need to know. Raises DiscoveryError as `discover` does."""
    if example_inputs is not None:
        given = example.as_inputs(example_inputs)
        structure = _structure(model, given, named)
        shape = shape_of(given.args, given.kwargs)
        return Findings(structure, counted_once([b.flops for b in structure.branches], shape), shape)
    short = _structure(model, example.build(model, 1, SHORT), named)
    counts = [b.flops for b in short.branches]
    if not example.takes_text(model):
        return Findings(short, counted_once(counts, Shape(1)), Shape(1))
    return Findings(short, _flops_by_length(model, counts, named), Shape(1, SHORT))


def checked_module(model: Any) -> nn.Module:
    """The model. Raises ConfigError for what is no module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {type(model).__name__}; dropbp.enable takes a torch.nn.Module.")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile(model)`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _flops_by_length(model: nn.Module, counts: Sequence[int], named: Names | None) -> FlopsModel:
    try:
        long = _structure(model, example.build(model, 1, LONG), named)
    except DiscoveryError as error:
        logger.debug("FLOPs are taken as proportional to the length: %s", error)
        return fitted(counts, [2 * c for c in counts], Shape(1, SHORT), Shape(1, 2 * SHORT))
    return fitted(counts, [b.flops for b in long.branches], Shape(1, SHORT), Shape(1, LONG))


def _structure(model: nn.Module, given: example.Inputs, named: Names | None) -> Structure:
    trace = record(model, given.args, given.kwargs)
    if named is None:
        return analyse(trace, model)
    return analyse_named(trace, model, [_names(name) for name in listed("branches", named)])


def _names(names: str | Sequence[str]) -> list[str]:
    """The modules of one branch."""
    each = [names] if isinstance(names, str) else listed("branches", names)
    if not all(isinstance(name, str) for name in each):
        raise ConfigError(f"branches holds {short(names)}; it takes names of modules, or lists of names.")
    return each
