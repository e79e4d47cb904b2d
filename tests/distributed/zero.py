"""What each rank does under DeepSpeed ZeRO."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # before zero.Init, which replaces functions that it looks at
import torch.distributed as dist
import transformers.models.llama.modeling_llama
from torch import nn

import dropbp
from tests.common.engine_models import llama_loss
from tests.distributed.ddp import where
from tests.distributed.traffic import Traffic
from tests.distributed.training import (
    BATCHES,
    STEPS,
    add_lora,
    global_mean,
    half_dropped,
    local_batch,
    make_model,
    make_optimizer,
)

# By default parameters as small as these are kept whole on every rank, and others for as long as there is room.
PARTITIONED = {"stage3_param_persistence_threshold": 0}
NOT_AHEAD = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def start() -> int:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
    deepspeed.init_distributed("gloo")
    return dist.get_rank()


def stop() -> None:
    dist.destroy_process_group()


def settings(stage: int, accumulation: int = 1, ahead: bool = False) -> dict[str, Any]:
    sharing = PARTITIONED if ahead else {**PARTITIONED, **NOT_AHEAD}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1 unless told not to
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, **(sharing if stage == 3 else {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def engine_of(model: nn.Module, stage: int, accumulation: int = 1, ahead: bool = False) -> Any:
    import deepspeed

    config = settings(stage, accumulation, ahead)
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    return engine


def run(
    engine: Any, handle: dropbp.Handle, steps: range, loss_of: Callable[[Any, torch.Tensor], torch.Tensor] = llama_loss
) -> tuple[list[float], list[Any]]:
    losses, masks = [], []
    for step in steps:
        loss = loss_of(engine, local_batch(step, **where()))
        engine.backward(loss)
        engine.step()
        losses.append(global_mean(loss, dist.get_world_size()))
        masks.append(handle.mask)
    return losses, masks


def trained(stage: int) -> Any:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    return run(engine_of(model, stage), handle, range(STEPS))


def trained_after(stage: int) -> Any:
    model = make_model()
    engine = engine_of(model, stage)
    handle = dropbp.enable(engine.module, drop_rate=0.5)
    names = [branch.parameters for branch in handle.branches]
    return *run(engine, handle, range(10)), names


def trained_from_partitions() -> Any:
    """Partitioned from birth, as `from_pretrained` does under ZeRO-3."""
    import deepspeed

    assert transformers
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        model = make_model()
    plain = make_model()
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(plain.get_parameter(name).data)
    try:
        dropbp.enable(model)
        refused = ""
    except dropbp.StateError as error:
        refused = str(error)
    engine = engine_of(model, 3)
    handle = dropbp.enable(engine.module, drop_rate=0.5)
    return *run(engine, handle, range(10)), refused


class HeadLoss(torch.autograd.Function):
    """Cross-entropy from the head's weight, which is whole in the forward only: fused losses are written so."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
            loss = nn.functional.cross_entropy(torch.mm(leaves[0], leaves[1].T), labels)
            ctx.gradients = torch.autograd.grad(loss, leaves)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return *(gradient * each for each in ctx.gradients), None


def trained_without_calling_the_head() -> Any:
    """As trainers with a fused loss do: the forward that finds the branches calls a module that training does not."""
    import deepspeed

    model: Any = make_model()
    whole = model.forward

    def forward(self: Any, fused: bool = False, **inputs: Any) -> Any:
        if not fused:
            return whole(**inputs)
        ids, weight = inputs["input_ids"], self.lm_head.weight
        hidden = self.model(ids).last_hidden_state[:, :-1]
        with contextlib.nullcontext() if weight.numel() else deepspeed.zero.GatheredParameters([weight]):
            return HeadLoss.apply(hidden.flatten(0, 1), weight, ids[:, 1:].flatten())

    model.forward = types.MethodType(forward, model)
    engine = engine_of(model, 3, ahead=True)
    handle = dropbp.enable(engine.module, drop_rate=0.5)
    return run(engine, handle, range(10), lambda engine, ids: engine(input_ids=ids, fused=True))


def trained_with_lora(stage: int) -> Any:
    model = add_lora(make_model())
    handle = dropbp.enable(model, drop_rate=0.5)
    return run(engine_of(model, stage), handle, range(10))


def accumulated(stage: int) -> Any:
    """Two micro-batches, a mask each, for every step."""
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    return run(engine_of(model, stage, accumulation=2), handle, range(2 * BATCHES))


def traffic(stage: int) -> dict[str, Any]:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    engine = engine_of(model, stage)
    found = {}
    for share in (0.0, 0.5, 1.0):
        for _ in range(3):  # ZeRO-3 learns the order of modules
            with half_dropped(handle, share), Traffic() as counted:
                loss = llama_loss(engine, local_batch(0, **where()))
                engine.backward(loss)
                engine.step()
        found[str(share)] = dict(counted.bytes)
    return found


def refusals(stage: int) -> dict[str, str]:
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    engine = engine_of(model, stage)
    found = {}
    for name, function in {
        "wrapper": lambda: dropbp.enable(engine),
        "calibrate": lambda: handle.calibrate(lambda: llama_loss(engine, local_batch(0, **where()))),
    }.items():
        try:
            function()
        except dropbp.DropBPError as error:
            found[name] = str(error)
    return found


CASES = {
    f"{name} {stage}": functools.partial(case, stage)
    for stage in (2, 3)
    for name, case in {
        "trained": trained,
        "after": trained_after,
        "lora": trained_with_lora,
        "accumulated": accumulated,
        "traffic": traffic,
        "refusals": refusals,
    }.items()
} | {"partitions": trained_from_partitions, "head": trained_without_calling_the_head}

__all__ = ["CASES", "start", "stop", "torch"]
