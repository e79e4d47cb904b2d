"""What each process runs under `accelerate launch`: loops on accelerate, and transformers' Trainer with the callback.

The same cases run in one process, started by the same launcher: that is what two are compared with.
"""

from __future__ import annotations

import functools
import gc
import os
import tempfile
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import dropbp
from dropbp.integrations.transformers import DropBPCallback
from tests.common.engine_models import llama_loss
from tests.distributed.training import BATCHES, ROWS, STEPS, global_mean, local_batch, make_model, make_optimizer

NO_CLIPPING = 1e6  # DeepSpeed takes 0 for its default, which is 1
ZERO = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def start() -> int:
    """On a CPU accelerate must be told: by `cpu=True`, and under DeepSpeed by the name of the backend."""
    if ZERO:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes
        PartialState(backend="gloo")
    return PartialState(cpu=not ZERO).process_index


def stop() -> None:
    gc.collect()  # replicas that wait for the collector must not outlive the process group: gloo can abort at the exit
    PartialState().destroy_process_group()


def new_accelerator(accumulation: int = 1) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    return Accelerator(
        cpu=not ZERO,
        gradient_accumulation_steps=accumulation,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(backend="gloo" if PartialState().use_distributed else None),
        ],
    )


def rows(steps: int) -> list[torch.Tensor]:
    """The rows of the global batches, one after the other."""
    return [row for step in range(steps) for row in local_batch(step)]


def loop(accumulation: int = 1, steps: int = STEPS) -> Any:
    """The loop of accelerate's documentation: losses over the global batch, and masks."""
    accelerator = new_accelerator(accumulation)
    model = make_model()
    handle = dropbp.enable(model, drop_rate=0.5)
    loader = DataLoader(rows(steps), batch_size=ROWS)  # type: ignore[arg-type]
    prepared, optimizer, loader = accelerator.prepare(model, make_optimizer(model), loader)
    losses, masks = [], []
    for ids_BS in loader:
        with accelerator.accumulate(prepared):
            loss = llama_loss(prepared, ids_BS)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(global_mean(loss, accelerator.num_processes))
        masks.append(handle.mask)
    return losses, masks, accelerator.num_processes


class Notes(TrainerCallback):
    """Losses and masks of a trainer's steps."""

    def __init__(self, callback: DropBPCallback) -> None:
        self.callback = callback
        self.losses: list[float] = []
        self.masks: list[Any] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.callback.handle is not None
        self.masks.append(self.callback.handle.mask)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def trainer(accumulation: int = 1, **options: Any) -> Any:
    """Nothing is set for several processes but the backend: the Trainer finds unused parameters by itself."""
    callback = DropBPCallback(drop_rate=0.5, **options)
    notes = Notes(callback)
    spread = PartialState().use_distributed
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=STEPS // accumulation, gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=ROWS // PartialState().num_processes, learning_rate=1e-3,
            lr_scheduler_type="constant", adam_epsilon=1e-4, max_grad_norm=NO_CLIPPING, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not ZERO, dataloader_pin_memory=False,
            ddp_backend="gloo" if spread else None,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in rows(BATCHES)]
        model = make_model()
        made = Trainer(model, arguments, train_dataset=data, callbacks=[notes, callback])  # type: ignore[arg-type]
        made.train()
    return notes.losses, notes.masks, made.accelerator.num_processes


CASES = {
    "loop": loop,
    "loop, accumulated": functools.partial(loop, 2),
    "trainer": trainer,
    "trainer, accumulated": functools.partial(trainer, 2),
    "trainer, zeros": functools.partial(trainer, fill="zero"),  # what a dropped branch's gradients are under ZeRO
}
