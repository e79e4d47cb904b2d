"""What each rank does under DistributedDataParallel."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dropbp
from tests.common.engine_models import llama_loss
from tests.distributed.traffic import Traffic
from tests.distributed.training import (
    LAYERS,
    add_lora,
    half_dropped,
    local_batch,
    make_model,
    make_optimizer,
    train,
)


def start() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


def stop() -> None:
    dist.destroy_process_group()


def where() -> dict[str, int]:
    return {"rank": dist.get_rank(), "world": dist.get_world_size()}


def wrapped(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **{"find_unused_parameters": True, "bucket_cap_mb": 0.02, **options})


def trained_before(**options: Any) -> Any:
    """Enabled, then wrapped."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    return train(wrapped(model, **options), handle, make_optimizer(model), **where())


def trained_after() -> Any:
    """Wrapped, then enabled."""
    model = make_model()
    replica = wrapped(model)
    handle = dropbp.enable(replica.module, drop_rate=0.5)
    return train(replica, handle, make_optimizer(model), **where())


def trained_with_kept_reduction() -> Any:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    replica = wrapped(model)
    handle.reduce_kept(replica)
    return train(replica, handle, make_optimizer(model), **where())


def trained_with_lora() -> Any:
    model = add_lora(make_model())
    handle = dropbp.enable(model, drop_rate=0.5)
    replica = wrapped(model)
    handle.reduce_kept(replica)
    return train(replica, handle, make_optimizer(model), range(10), **where())


def accumulated() -> list[list[float]]:
    """Gradients after three micro-batches with masks of their own, the last one exchanged; with all, and kept."""
    return [_accumulated(False), _accumulated(True)]


def _accumulated(kept_only: bool) -> list[float]:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    replica = wrapped(model)
    if kept_only:
        handle.reduce_kept(replica)
    norms = []
    for round_ in range(3):
        with replica.no_sync():
            for micro in range(2):
                llama_loss(replica, local_batch(10 * round_ + micro, **where())).backward()
        llama_loss(replica, local_batch(10 * round_ + 2, **where())).backward()
        norms += [-1.0 if p.grad is None else p.grad.norm().item() for p in model.parameters()]
        model.zero_grad()
    return norms


def two_forwards() -> list[list[Any]]:
    """Masks and norms of the gradients of steps with two forwards before their backward."""
    found: list[list[Any]] = []
    for masks in ("nested", "exact"):
        model = make_model()
        handle = dropbp.enable(model, drop_rate=0.5, masks=masks)
        replica = wrapped(model)
        for step in range(6):
            with replica.no_sync() if step % 3 == 1 else contextlib.nullcontext():
                loss = llama_loss(replica, local_batch(step, **where()))
            first = handle.mask
            (loss + llama_loss(replica, local_batch(step + 1, **where()))).backward()
            norms = [0.0 if p.grad is None else p.grad.norm().item() for p in model.parameters()]
            found.append([first, handle.mask, norms])
            model.zero_grad()
            llama_loss(replica, local_batch(step, **where()))  # goes nowhere
            kept_for_later = llama_loss(replica, local_batch(step, **where()))
            llama_loss(replica, local_batch(step, **where())).backward()
            del kept_for_later
            model.zero_grad()
    return found


def traffic() -> dict[str, dict[str, int]]:
    """Bytes of one step, with nothing, half and all of the blocks dropped."""
    found = {}
    for kept_only in (False, True):
        model = make_model()
        handle = dropbp.enable(model, drop_rate=0.5)
        replica = wrapped(model)
        if kept_only:
            handle.reduce_kept(replica)
        for share in (0.0, 0.5, 1.0):
            with half_dropped(handle, share), Traffic() as counted:
                llama_loss(replica, local_batch(0, **where())).backward()
            model.zero_grad()
            found[f"{'kept' if kept_only else 'all'} {share}"] = counted.bytes["allreduce"]
    return found


def refusals() -> dict[str, str]:
    """What enabling, and a step, say of wrong wrappers and flags."""
    plain = wrapped(make_model(), find_unused_parameters=False)
    return {
        "wrapper": _error(lambda: dropbp.enable(plain)),
        "flag": _error(_one_step_without_flag),
        "static": _error(_two_masks_with_static_graph),
        "nothing dropped": _error(_nothing_dropped_without_flag),
        "one mask": _error(_one_mask_with_static_graph),
        "two masks": _error(_two_masks_before_one_backward),
    }


def _error(function: Callable[[], Any]) -> str:
    try:
        function()
    except dropbp.DropBPError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _one_step_without_flag() -> None:
    model = make_model()
    dropbp.enable(model, drop_rate=0.5)
    llama_loss(wrapped(model, find_unused_parameters=False), local_batch(0, **where())).backward()


def _nothing_dropped_without_flag() -> None:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.0)
    train(wrapped(model, find_unused_parameters=False), handle, make_optimizer(model), range(3), **where())


def _with_static_graph(masks: list[list[bool]]) -> None:
    model = make_model()
    handle = dropbp.enable(model)
    replica = wrapped(model, find_unused_parameters=False, static_graph=True)
    for step, mask in enumerate(masks):
        with handle.fixed(mask):
            llama_loss(replica, local_batch(step, **where())).backward()


def _two_masks_before_one_backward() -> None:
    model = make_model()
    handle = dropbp.enable(model)
    replica = wrapped(model)
    with handle.fixed([True, False] * LAYERS):
        loss = llama_loss(replica, local_batch(0, **where()))
    with handle.fixed([False, True] * LAYERS):
        (loss + llama_loss(replica, local_batch(0, **where()))).backward()


def _two_masks_with_static_graph() -> None:
    _with_static_graph([[True, False] * LAYERS, [True] * 2 * LAYERS])


def _one_mask_with_static_graph() -> None:
    _with_static_graph([[True, False] * LAYERS] * 3)


def calibrated() -> dict[str, list[float]]:
    """Sensitivities of the global batch."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    replica = wrapped(model)
    found = {}
    for method in ("exact", "one-pass"):
        result = handle.calibrate(lambda: llama_loss(replica, local_batch(0, **where())), method=method)
        found[method] = [*result.sensitivities, *result.rates]
    return found


def resumed() -> Any:
    """Ten steps, state saved and loaded into a fresh model, ten more."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    optimizer = make_optimizer(model)
    first = train(wrapped(model), handle, optimizer, range(10), **where())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
    model = make_model(seed=9)
    optimizer = make_optimizer(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    handle = dropbp.enable(model, drop_rate=0.5)
    handle.load_state_dict(saved[2])
    rest = train(wrapped(model), handle, optimizer, range(10, 20), **where())
    return first[0] + rest[0], first[1] + rest[1]


CASES = {
    "before": trained_before,
    "after": trained_after,
    "kept": trained_with_kept_reduction,
    "views": lambda: trained_before(gradient_as_bucket_view=True),
    "lora": trained_with_lora,
    "accumulated": accumulated,
    "two forwards": two_forwards,
    "traffic": traffic,
    "calibrated": calibrated,
    "resumed": resumed,
    "refusals": refusals,  # last: what is refused leaves replicas behind in the middle of a step
}

__all__ = ["CASES", "start", "stop"]
