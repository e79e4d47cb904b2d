"""What each rank does under FSDP2, `fully_shard`."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import dropbp
from tests.common.engine_models import Block, llama_loss
from tests.distributed.ddp import start, stop, where
from tests.distributed.traffic import Traffic
from tests.distributed.training import (
    add_lora,
    half_dropped,
    local_batch,
    make_model,
    make_optimizer,
    train,
)

# Not strict: a parameter that was dropped in every step so far has no optimizer state yet.
WHOLE = StateDictOptions(full_state_dict=True, strict=False)


def sharded(model: nn.Module, branches: bool = False) -> Any:
    """Each block by itself, then the rest; with `branches` attention and MLP by themselves too."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        for part in (layer.self_attn, layer.mlp) if branches else ():
            fully_shard(part)
        fully_shard(layer)
    return fully_shard(model)


def trained_before() -> Any:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    sharded(model)
    return train(model, handle, make_optimizer(model), **where())


def trained_after() -> Any:
    model = sharded(make_model())
    handle = dropbp.enable(model, drop_rate=0.5)
    return train(model, handle, make_optimizer(model), **where())


def trained_by_branch() -> Any:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    sharded(model, branches=True)
    return train(model, handle, make_optimizer(model), range(10), **where())


def trained_with_checkpointing() -> Any:
    model = make_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle = dropbp.enable(model, drop_rate=0.5)
    sharded(model)
    return train(model, handle, make_optimizer(model), range(10), **where())


def trained_with_lora() -> Any:
    runs = []
    for enable_first in (True, False):
        model = add_lora(make_model())
        if not enable_first:
            sharded(model)
        handle = dropbp.enable(model, drop_rate=0.5)
        if enable_first:
            sharded(model)
        runs.append(train(model, handle, make_optimizer(model), range(8), **where()))
        with half_dropped(handle, 0.5), Traffic() as counted:
            llama_loss(model, local_batch(0, **where())).backward()
        runs.append(counted.calls["allgather_base"])
    return runs


def traffic() -> dict[str, dict[str, int]]:
    """Bytes of one step with nothing, half and all of the blocks dropped, and whether all is sharded again after."""
    found: dict[str, Any] = {}
    for kind in ("blocks", "branches"):
        model = make_model()
        handle = dropbp.enable(model, drop_rate=0.5)
        sharded(model, branches=kind == "branches")
        llama_loss(model, local_batch(0, **where())).backward()
        for share in (0.0, 0.5, 1.0):
            model.zero_grad()
            with half_dropped(handle, share), Traffic() as counted:
                llama_loss(model, local_batch(0, **where())).backward()
            found[f"{kind} {share}"] = dict(counted.bytes)
            found[f"{kind} {share} sharded"] = _all_sharded(model)
    return found


def _all_sharded(model: nn.Module) -> bool:
    return all(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def two_forwards_before_one_backward() -> list[float]:
    """Norms of gradients; the first forward keeps what the second one drops."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    sharded(model)
    count = len(handle.branches)
    return both_orders(model, handle, count, where())


def both_orders(model: Any, handle: Any, count: int, place: dict[str, int]) -> list[float]:
    norms: list[float] = []
    upper = [i >= count // 2 for i in range(count)]
    for first in (upper, [not drop for drop in upper]):
        losses = []
        for step, mask in enumerate((first, [not drop for drop in first])):
            with handle.fixed(mask):
                losses.append(llama_loss(model, local_batch(step, **place)))
        (losses[0] + losses[1]).backward()
        norms += gradient_norms(model)
        model.zero_grad()
    return norms


def gradient_norms(model: nn.Module) -> list[float]:
    norms = [-1.0 if p.grad is None else p.grad.norm() for p in model.parameters()]
    return [float(n.full_tensor()) if hasattr(n, "full_tensor") else float(n) for n in norms]


class SquashedBlock(Block):
    """Its last operation saves a tensor, so that checkpointing recomputes it though both branches are dropped."""

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x_BSD))


class SquashedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(SquashedBlock(8) for _ in range(3))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x_BSD = self.stem(x_BSD)
        for block in self.blocks:
            x_BSD = checkpoint(block, x_BSD, use_reentrant=False) if torch.is_grad_enabled() else block(x_BSD)
        return x_BSD


def squashed_net() -> tuple[SquashedNet, torch.Tensor]:
    torch.manual_seed(4)
    return SquashedNet().train(), torch.randn(2, 4, 8)


def recomputed_in_spite_of_all() -> list[float]:
    """Norms of gradients where dropped blocks are recomputed: the ranks see the same data."""
    model, batch = squashed_net()
    handle = dropbp.enable(model, example_inputs=batch)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return squashed_norms(model, handle, batch)


def squashed_norms(model: SquashedNet, handle: dropbp.Handle, batch: torch.Tensor) -> list[float]:
    norms = []
    for mask in ([True] * 6, [True, True, False, False, True, True], [False] * 6):
        with handle.fixed(mask):
            model(batch).square().mean().backward()
        norms += gradient_norms(model)
        model.zero_grad()
    return norms


def backward_broken_off() -> bool:
    """After a backward that raised, and with a loss taken from inside the model, gradients are whole."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.0)
    sharded(model)
    caught = []
    model.model.layers[2].register_forward_hook(lambda module, args, output: caught.append(output))
    with handle.fixed([True] * 8):
        output = model(input_ids=local_batch(0, **where()))
        output.logits.register_hook(_raise)
        with contextlib.suppress(ZeroDivisionError):
            output.logits.sum().backward()
    model(input_ids=local_batch(0, **where()))
    caught[-1].square().mean().backward()
    return all(p.grad is not None for p in model.model.layers[0].parameters())


def _raise(gradient: torch.Tensor) -> None:
    raise ZeroDivisionError


def removed() -> bool:
    """After `remove` all blocks gather again."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    sharded(model)
    with handle.fixed([True] * 8):
        llama_loss(model, local_batch(0, **where())).backward()
    handle.remove()
    with Traffic() as counted:
        llama_loss(model, local_batch(0, **where())).backward()
    return counted.calls["allgather_base"] == 9


def calibrated() -> dict[str, list[float]]:
    found = {}
    for when in ("before", "after"):
        model = make_model()
        if when == "after":
            sharded(model)
        handle = dropbp.enable(model, drop_rate=0.5)
        if when == "before":
            sharded(model)
        for method in ("exact", "one-pass"):
            result = handle.calibrate(lambda: llama_loss(model, local_batch(0, **where())), method=method)  # noqa: B023
            found[f"{method} {when}"] = [*result.sensitivities, *result.rates]
    return found


def resumed() -> Any:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    optimizer = make_optimizer(sharded(model))
    first = train(model, handle, optimizer, range(10), **where())
    states = get_state_dict(model, optimizer, options=WHOLE)
    position = handle.state_dict()
    model = make_model(seed=9)
    handle = dropbp.enable(model, drop_rate=0.5)
    optimizer = make_optimizer(sharded(model))
    set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=WHOLE)
    for name, parameter in model.named_parameters():
        if name not in states[1]["state"]:  # PyTorch made one up, that looks like a step taken
            del optimizer.state[parameter]
    handle.load_state_dict(position)
    rest = train(model, handle, optimizer, range(10, 20), **where())
    return first[0] + rest[0], first[1] + rest[1]


CASES = {
    "before": trained_before,
    "after": trained_after,
    "branches": trained_by_branch,
    "checkpointing": trained_with_checkpointing,
    "lora": trained_with_lora,
    "traffic": traffic,
    "two forwards": two_forwards_before_one_backward,
    "recomputed": recomputed_in_spite_of_all,
    "calibrated": calibrated,
    "resumed": resumed,
    "removed": removed,
    "broken off": backward_broken_off,
}

__all__ = ["CASES", "dist", "start", "stop"]
