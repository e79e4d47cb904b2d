"""Guards around a recording forward; each restores one part of the state."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dropbp._torch import compiled_code_off
from dropbp.device import fork_rng
from dropbp.errors import DiscoveryError
from dropbp.tensors import own_attributes

# Random state and attention kernels are settings of the process: overlapping threads would restore each other's values.
_one_at_a_time = threading.RLock()


@contextlib.contextmanager
def recording_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, restored random state, no compiled code, no cached casts; everything is restored afterwards."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer._version, buffer.detach().clone()) for buffer in model.buffers()]
    cache = torch.is_autocast_cache_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_one_at_a_time)
        stack.enter_context(fork_rng(model))
        stack.enter_context(compiled_code_off())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _never_unpacked))
        stack.enter_context(torch.enable_grad())
        try:
            torch.set_autocast_cache_enabled(False)
            for module, _ in training:
                module.training = False
            yield
        finally:
            torch.set_autocast_cache_enabled(cache)
            for module, mode in training:
                module.training = mode
            _restore_buffers(buffers)


@contextlib.contextmanager
def module_attributes_restored(model: nn.Module) -> Iterator[None]:
    """Put back what the recorded forward left in modules.

    LeViT keeps its attention biases in evaluation mode: their graph can neither run backward nor be copied, and their
    weights will change. Wav2Vec2-Conformer replaces its position table for longer rows. Such a module gets all its
    attributes back, since a flag may say that the part is there.
    """
    before = [(module, dict(vars(module)), dict(module._buffers), _contents(module)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, buffers, contents in before:
            replaced = any(module._buffers.get(name) is not buffer for name, buffer in buffers.items())
            if replaced or any(map(_is_recorded, own_attributes(module).values())):
                _set_attributes(module, attributes)
                module._buffers.update(buffers)
                for container, items in contents:
                    container.clear()
                    (container.update if isinstance(container, dict) else container.extend)(items)


@contextlib.contextmanager
def refuse_replaced_modules(model: nn.Module) -> Iterator[None]:
    """Restore a model that replaced modules because of the generated inputs, and raise DiscoveryError.

    BigBird switches to full attention at the first short row, and does not switch back.
    """
    before = [(name, module, dict(vars(module)), dict(module._modules)) for name, module in model.named_modules()]
    replaced: list[str] = []
    failure = None
    try:
        yield
    except DiscoveryError as error:
        failure = error
    finally:
        for name, module, _, children in before:
            gone = (child for child, inner in children.items() if module._modules.get(child) is not inner)
            replaced += [f"{name}.{child}" if name else child for child in gone]
        if replaced:
            for _, module, attributes, children in before:
                _set_attributes(module, attributes)
                module._modules.clear()
                module._modules.update(children)
    if replaced:
        raise DiscoveryError(
            f"In the small forward that finds the residual branches, {type(model).__name__} replaced the module "
            f"{replaced[0]}; this was undone. Rows as long as yours may need the original one: pass example_inputs=... "
            "with rows of the length that you train on."
        ) from failure
    if failure is not None:
        raise failure


def _set_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    vars(module).clear()
    vars(module).update(attributes)


_CONTAINERS = (list, dict, OrderedDict, defaultdict)


def _is_recorded(value: Any) -> bool:
    """Whether the value is a tensor of a recorded forward, or contains one."""
    if isinstance(value, torch.Tensor):
        return value.grad_fn is not None
    return any(map(_is_recorded, _items(value)))


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """All lists and dicts in the attributes of a module, each with a copy."""
    values = own_attributes(module).values()
    return [(container, copy.copy(container)) for value in values for container in _containers(value)]


def _containers(value: Any) -> Iterator[Any]:
    value = _table(value)
    if type(value) in _CONTAINERS:
        yield value
    for item in _items(value):
        yield from _containers(item)


def _items(value: Any) -> Iterable[Any]:
    value = _table(value)
    if type(value) in (*_CONTAINERS, tuple):
        return value.values() if isinstance(value, dict) else value
    return ()


def _table(value: Any) -> Any:
    """The attribute dictionary of a dataclass, because reading an attribute of a configuration may raise an error."""
    is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return getattr(value, "__dict__", ()) if is_object else value


@contextlib.contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Shard modules under `fully_shard` again afterwards.

    A forward without a backward leaves the root module gathered. Optimizers created then would hold the gathered
    tensors instead of the parameters.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if hasattr(module, "set_unshard_in_backward"):
                cast(Any, module).reshard()


@contextlib.contextmanager
def zero3_state_released(model: nn.Module) -> Iterator[None]:
    """Make DeepSpeed ZeRO-3 release gathered parameters and forget the recorded order of modules.

    A forward without a backward leaves parameters gathered, and ZeRO would prefetch in the recorded order. Training may
    call other modules, for example a loss that uses the head's weight directly; its backward would then find the stale
    state.
    """
    try:
        yield
    finally:
        optimizers: Iterator[Any] = (getattr(parameter, "_z3_optimizer", None) for parameter in model.parameters())
        offload: Any = next((o.parameter_offload for o in optimizers if hasattr(o, "parameter_offload")), None)
        if offload is not None:
            offload.empty_partition_cache()
            if not offload.get_param_coordinator().is_invalid_trace():
                offload.get_param_coordinator()._invalidate_trace()


def _restore_buffers(buffers: Sequence[tuple[torch.Tensor, int, torch.Tensor]]) -> None:
    for buffer, version, kept in buffers:
        # a write to `buffer.data` leaves the version as it was
        plain = type(buffer) is torch.Tensor and not buffer.is_meta
        if buffer._version != version or (plain and not torch.equal(buffer, kept)):
            with torch.no_grad():
                buffer.copy_(kept)


def _never_unpacked(_: None) -> torch.Tensor:
    raise DiscoveryError("The graph of the recorded forward was run backward, but it can only be inspected.")


@contextlib.contextmanager
def all_parameters_require_grad(model: nn.Module) -> Iterator[None]:
    """Make frozen floating-point parameters require gradients during the recording, so that no path is missed."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point() and is_unsharded(p)]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def is_unsharded(parameter: torch.Tensor) -> bool:
    """Whether the parameter is not a shard."""
    return not hasattr(parameter, "device_mesh")
