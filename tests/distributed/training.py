"""The training run that every engine repeats: the same model, masks and global data, on one process or on several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import dropbp
from tests.common.engine_models import llama_loss, tiny_llama, tokens

STEPS = int(os.environ.get("DROPBP_TEST_STEPS", "15"))  # of each run; the published ones are longer
ROWS = 4  # of the global batch, split evenly over the ranks
LAYERS = 4
BATCHES = 5  # seen again and again, so that there is something to learn
LEARNING_RATE = 1e-3


def make_model(seed: int = 1, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return tiny_llama(LAYERS, **{"hidden_size": 32, "intermediate_size": 64, **changes})


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # A large eps: where a gradient is nothing but rounding, Adam would otherwise make a full step of it.
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=1e-4, weight_decay=0.01)


def local_batch(step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    share = ROWS // world
    return tokens(seed=100 + step % BATCHES, rows=ROWS, length=8)[rank * share : (rank + 1) * share]


def global_mean(loss: torch.Tensor, world: int) -> float:
    mean = loss.detach().clone()
    if world > 1:
        torch.distributed.all_reduce(mean)
    return mean.item() / world


def train(
    model: Callable[..., Any],
    handle: dropbp.Handle,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int] = range(STEPS),
    rank: int = 0,
    world: int = 1,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> tuple[list[float], list[tuple[bool, ...]]]:
    """Losses over the global batch, and masks."""
    losses, masks = [], []
    for step in steps:
        loss = llama_loss(model, local_batch(step, rank, world))
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(global_mean(loss, world))
        masks.append(handle.mask)
    return losses, masks


def alone(steps: int, prepare: Callable[[nn.Module], nn.Module], zeros: bool) -> Any:
    """The run in one process; with `zeros` a missing gradient is zero."""
    model = prepare(make_model())
    handle = dropbp.enable(model, drop_rate=0.5)

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        if zeros:
            fill_missing(model)

    return train(model, handle, make_optimizer(model), range(steps), backward=backward)


def fill_missing(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def accumulated_alone(steps: int) -> list[float]:
    """Losses of two micro-batches for each step; a gradient that is missing in both is zero."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    optimizer = make_optimizer(model)
    losses = []
    for step in range(steps):
        for micro in (2 * step, 2 * step + 1):
            loss = llama_loss(model, local_batch(micro))
            (loss / 2).backward()
            losses.append(loss.item())
        fill_missing(model)
        optimizer.step()
        optimizer.zero_grad()
    assert handle.enabled
    return losses


def add_lora(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted


@contextlib.contextmanager
def half_dropped(handle: dropbp.Handle, share: float) -> Any:
    """The branches of the last `share` of the blocks are dropped, two in each block."""
    count = len(handle.branches)
    with handle.fixed([i >= count * (1 - share) for i in range(count)]):
        yield
