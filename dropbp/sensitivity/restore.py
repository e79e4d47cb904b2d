"""Passes over a model that leave no trace: gradients, random state, buffers and mode are restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from dropbp.device import fork_rng
from dropbp.engine.distributed import is_partitioned
from dropbp.errors import StateError
from dropbp.tensors import buffers_restored


@contextlib.contextmanager
def training_state_restored(model: nn.Module) -> Iterator[None]:
    """Restore gradients, random state, buffers and the root's mode afterwards, even after an error."""
    _refuse_hidden_gradients(model)
    gradients = [(p, p.grad) for p in model.parameters()]
    training = model.training
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        model.training = True
        with fork_rng(model), buffers_restored(model), torch.enable_grad():
            yield
    finally:
        model.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _refuse_hidden_gradients(model: nn.Module) -> None:
    if is_partitioned(model):
        raise StateError(
            "DeepSpeed ZeRO keeps gradients inside its engine, where they cannot be read. Calibrate before building "
            "the engine, or set rates with handle.set_rates(...)."
        )
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise StateError(
                f"Parameter {name} has a hook that runs when its gradient is ready, as in optimizers that step during "
                "the backward. A calibration would trigger it and change the model. Calibrate before the hooks are "
                "registered, or set rates with handle.set_rates(...)."
            )
