"""`discover` finds the residual branches of a model and their FLOPs at any shape, and leaves the model unchanged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from dropbp import inputs as example
from dropbp.checks import listed, short
from dropbp.discovery.backward_flops import BackwardFlops
from dropbp.discovery.build import analyse
from dropbp.discovery.named import analyse_named
from dropbp.discovery.record import record
from dropbp.discovery.restore import refuse_replaced_modules
from dropbp.discovery.structure import Branch, Structure
from dropbp.errors import ConfigError, DiscoveryError
from dropbp.flops import TOKENS, FlopsModel, Shape, fitted, pads, shape_of

logger = logging.getLogger(__name__)

Names = Sequence[str | Sequence[str]]
AtInputs = Callable[[example.Inputs], dict[Shape, Structure]]
SHORT = 16
CHUNKS = 240  # additional tokens


@dataclass(frozen=True)
class Findings:
    """The results of recording a few small forwards of a model.

    Attributes:
        structure: the branches, and what must be done to drop them.
        flops: forward FLOPs of each branch at any shape.
        weights: weight of each branch in the budget at any shape: the FLOPs of its actual backward.
        shape: the shape of the first recorded forward.
        call_signature: what the recorded call asked for; see `dropbp.inputs.call_signature`.
    """

    structure: Structure
    flops: FlopsModel
    weights: BackwardFlops
    shape: Shape
    call_signature: example.CallSignature = frozenset()

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches with their FLOPs at `shape`."""
        counts = self.flops.at(self.shape)
        return tuple(replace(b, flops=f) for b, f in zip(self.structure.branches, counts, strict=True))


def discover(model: nn.Module, example_inputs: Any = None, branches: Names | None = None) -> tuple[Branch, ...]:
    """The residual branches of a model, from the input upwards; the model is not changed.

    Raises:
        DiscoveryError: no branch was found, a block was not understood, or the forward needs `example_inputs`.
    """
    return find(unwrapped(checked_module(model)), example_inputs, branches).branches


def find(model: nn.Module, example_inputs: Any, named: Names | None) -> Findings:
    """The findings that `discover` and `enable` need. Raises DiscoveryError as `discover` does."""
    if example_inputs is not None:
        return _find(model, example.as_inputs(example_inputs), named)
    with refuse_replaced_modules(model):
        return _find(model, example.build(model, 1, SHORT), named)


def _find(model: nn.Module, given: example.Inputs, named: Names | None) -> Findings:
    shape, structure = shape_of(given.args, given.kwargs), _structure(model, given, named)
    every = [structure]
    recorded = partial(_recorded, model, structure, named, every)
    found = {**recorded(example.with_other_rows(given)), shape: structure, **_at_other_lengths(model, given, recorded)}
    if pads(_counts(found)):
        found |= recorded(example.longer(model, given, source=True, target=True, more=CHUNKS))
    flops = fitted(_counts(found))
    works = {shape: each.work for shape, each in found.items()}
    structure = replace(structure, calls_follow_shape=_calls_follow_shape(every))
    call_signature = example.call_signature(example.argument_names(model), given.args, given.kwargs)
    return Findings(structure, flops, BackwardFlops(works, model), shape, call_signature)


def _calls_follow_shape(found: Iterable[Structure]) -> frozenset[str]:
    """The modules of branches that are not called equally often at all shapes."""
    calls: dict[str, int] = {}
    modules = (module for structure in found for module in structure.branch_modules)
    return frozenset(m.name for m in modules if calls.setdefault(m.name, len(m.needs)) != len(m.needs))


def checked_module(model: Any) -> nn.Module:
    """The model itself. Raises ConfigError if it is not a module."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {type(model).__name__}; dropbp.enable takes a torch.nn.Module.")
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile(model)`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _at_other_lengths(model: nn.Module, given: example.Inputs, recorded: AtInputs) -> dict[Shape, Structure]:
    """The same branches recorded at other lengths, the longest last: as many as the fit of their FLOPs needs."""
    if not shape_of(given.args, given.kwargs).sequence_length:
        return {}
    longer = partial(example.longer, model)
    by_source = recorded(longer(given, source=True, target=False))
    if not example.has_decoder(model, given):
        again = not by_source or _only_text(given)
        return by_source if again else {**by_source, **recorded(longer(longer(given, True, False), True, False))}
    more = longer(given, source=False, target=True)
    by_target = recorded(more)
    if by_source and by_target:
        return {**by_source, **by_target, **recorded(longer(given, source=True, target=True))}
    return {**by_source, **by_target, **recorded(longer(more, source=False, target=bool(by_target)))}


def _recorded(
    model: nn.Module, structure: Structure, named: Names | None, every: list[Structure], given: example.Inputs
) -> dict[Shape, Structure]:
    """The same branches in another forward, noted in `every`; empty if that forward fails or has other branches."""
    shape = shape_of(given.args, given.kwargs)
    try:
        found = _structure(model, given, named)
    except DiscoveryError as error:
        logger.debug("FLOPs are not counted at %s: %s", shape, error)
        return {}
    every.append(found)
    return {shape: found} if len(found.branches) == len(structure.branches) else {}


def _counts(found: Mapping[Shape, Structure]) -> dict[Shape, list[int]]:
    return {shape: [branch.flops for branch in each.branches] for shape, each in found.items()}


def _only_text(given: example.Inputs) -> bool:
    """Whether all inputs are text, so that every branch's cost grows with the number of tokens."""
    tensors = [(name, value) for name, value in given.kwargs.items() if isinstance(value, torch.Tensor)]
    return not given.args and all(name in TOKENS or not value.is_floating_point() for name, value in tensors)


def _structure(model: nn.Module, given: example.Inputs, named: Names | None) -> Structure:
    trace = record(model, given.args, given.kwargs)
    if named is not None:
        return analyse_named(trace, model, [_names(name) for name in listed("branches", named)])
    try:
        structure = analyse(trace, model)
    except DiscoveryError:
        finer = _with_identities(model, given)
        if finer is None:
            raise
        return finer
    finer = _with_identities(model, given) if structure.inexact else None
    return structure if finer is None or finer.inexact >= structure.inexact else finer


def _with_identities(model: nn.Module, given: example.Inputs) -> Structure | None:
    """The structure if branches may also end in a module that returns its input, such as dropout in evaluation mode.

    None if there is none, or if such a module runs more than once: another of its calls may lead to an output.
    """
    try:
        found = analyse(record(model, given.args, given.kwargs, identities=True), model)
    except DiscoveryError:
        return None
    ends = found.identities.intersection(end.module for end in found.branch_outputs)
    repeated = any(len(entry.needs) > 1 for entry in found.branch_modules if entry.name in ends)
    return found if ends and not repeated else None


def _names(names: str | Sequence[str]) -> list[str]:
    """The modules of one branch."""
    each = [names] if isinstance(names, str) else listed("branches", names)
    if not all(isinstance(name, str) for name in each):
        raise ConfigError(f"branches holds {short(names)}; pass names of modules, or lists of names.")
    return each
