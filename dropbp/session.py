"""The public calls on a model: `enable`, `disable`, `compile_blocks`, and the checks of their arguments."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from dropbp.config import Config, make_config
from dropbp.device import Device, get_device
from dropbp.discovery.discover import checked_module, find, unwrapped
from dropbp.engine.distributed import refuse_wrapper
from dropbp.engine.integrity import refuse_per_sample_gradients
from dropbp.engine.regional import compile_each
from dropbp.engine.root import RootState
from dropbp.engine.trained import warn_of_untrained
from dropbp.errors import ConfigError, StateError
from dropbp.handle import Handle
from dropbp.masks.budget import out_of_reach
from dropbp.masks.registry import sampler_kinds

logger = logging.getLogger(__name__)


def enable(
    model: nn.Module,
    drop_rate: float = 0.5,
    *,
    device: str | torch.device | Device | None = None,
    masks: str = "nested",
    seed: int = 0,
    example_inputs: Any = None,
    branches: Sequence[str | Sequence[str]] | None = None,
    **options: Any,
) -> Handle:
    """Make every training step skip the backward of a random `drop_rate` share of the residual branches.

    The forward output stays bit-identical. Autograd does not record a skipped branch: it saves no activations, and its
    parameters keep `grad is None`. Only this instance is changed; `handle.remove()`, or leaving the `with` block,
    restores it. Forwards in evaluation mode or under `no_grad` are untouched.

    A warning names the parameters that will train in few steps or in none; `handle.report()` lists them.

    Args:
        model: a module with residual branches that discovery can find, in any mode, on any device (meta included), with
            or without adapters.
        drop_rate: share of the branches' backward FLOPs to skip, 0 <= drop_rate < 1.
        device: name of a device adapter (`cpu`, `cuda`, `hpu`, ...), a torch.device, or an adapter. None uses the
            model's device. `enable` does not move the model.
        masks: the mask sampler, which decides which branches are dropped together. `nested`: each step trains the top
            of the model down to a random depth, with exact gradients, and meets the budget on average. `exact`: any set
            of branches, within one branch of the budget in every step. `independent` (the paper's), `cyclic`, `pool`:
            see `dropbp.masks.samplers`.
        seed: seed of the mask generator.
        example_inputs: inputs that the model accepts: a dict of keyword arguments, a tuple of positional ones, or one
            tensor. Not needed for models that describe their inputs (transformers).
        branches: use these branches instead of the discovered ones: module names, or lists of names that are skipped
            together.
        **options: the other fields of `dropbp.config.Config`.

    Raises:
        ConfigError: an option has a value that is not allowed.
        DiscoveryError: no residual branch was found, or a block was not understood.
        StateError: the model is already enabled, is a wrapper around the model to enable, or has no trainable
            parameter.
        DeviceError: the device is unknown or not available.

    Source: Woo et al., DropBP, NeurIPS 2024, https://arxiv.org/abs/2402.17812.
    """
    config = _config(drop_rate, masks, seed, options)
    model = _checked_model(model)
    adapter = get_device(device, model)
    adapter.check_model(model)
    if adapter.is_lazy():
        _check_lazy(config, adapter.name)
    handle = Handle(model, config, adapter, find(model, example_inputs, branches))
    warn_of_untrained(handle.engine.trained, handle.config, handle.rates)
    unmet = out_of_reach(handle.schedule)
    if unmet is not None:
        logger.warning("%s: %s", type(model).__name__, unmet)
    return handle


def check_options(drop_rate: float, masks: str, options: Mapping[str, Any]) -> None:
    """Raises ConfigError if `enable` would refuse these options for every model."""
    named = inspect.signature(enable).parameters
    others = {name: value for name, value in options.items() if name not in named}
    _config(drop_rate, masks, options.get("seed", 0), others)


def _config(drop_rate: float, masks: str, seed: int, options: Mapping[str, Any]) -> Config:
    known = {name: entry.options for name, entry in sampler_kinds().items()}
    return make_config(drop_rate, masks, seed, options, known)


def _check_lazy(config: Config, name: str) -> None:
    """Raises ConfigError for options that a device with recorded and compiled graphs cannot use."""
    if config.logits == "labelled":
        raise ConfigError(
            f"logits='labelled' does not work on {name}, which compiles again for each shape: the number of labelled "
            "positions differs between batches. Leave it out."
        )
    if config.activation_cache is not None:
        raise ConfigError(
            f"activation_cache does not work on {name}, which compiles recorded graphs: each cache border would need a "
            "graph of its own, and this is untested. Leave it out."
        )


def disable(model: nn.Module) -> None:
    """Remove DropBP from a model, whoever enabled it. Does nothing if the model is not enabled."""
    handle = handle_of(model)
    if handle is not None:
        handle.remove()


def _checked_model(model: Any) -> nn.Module:
    refuse_wrapper(checked_module(model))
    model = unwrapped(model)
    refuse_per_sample_gradients(model)
    earlier = handle_of(model)
    enabled = earlier is not None and not earlier.engine.is_abandoned()
    if enabled or any(m.__dict__.get("_dropbp_branch") is not None for m in model.modules()):
        raise StateError(
            f"{type(model).__name__} is already enabled. Change it through its handle (set_rates, fixed), or call "
            "handle.remove() or dropbp.disable(model) first."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise StateError(
            f"No parameter of {type(model).__name__} requires a gradient, so there is no backward to skip. Unfreeze "
            "parameters or add adapters first."
        )
    return cast(nn.Module, model)


def compile_blocks(enabled: Handle | nn.Module, **options: Any) -> tuple[str, ...]:
    """Compile every block of an enabled model in place with `module.compile(**options)`.

    Module names, classes and `state_dict` keys do not change. Each set of branches that a step drops in a block
    compiles one graph the first time it occurs, so the compilations happen in the first steps.

    Args:
        enabled: the handle that `dropbp.enable` returned, or the model that was passed to it.
        **options: options of `torch.compile`: backend, mode, fullgraph, dynamic, options.

    Returns:
        Qualified names of the compiled blocks.

    Raises:
        StateError: the model is not enabled.
        ConfigError: no block repeats in the model. Compile the whole model with `masks="nested"` or `masks="pool"`
            instead.
    """
    handle = enabled if isinstance(enabled, Handle) else handle_of(enabled)
    if handle is None or not handle.enabled:
        raise StateError(
            "compile_blocks needs an enabled model: handle = dropbp.enable(model, ...), then "
            "dropbp.compile_blocks(handle)."
        )
    return compile_each(handle.model, handle.branches, options)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of an enabled model; None if the model is not enabled."""
    root = unwrapped(checked_module(model)).__dict__.get("_dropbp_root")
    return root.owner if isinstance(root, RootState) and isinstance(root.owner, Handle) else None
