"""The training stacks: each trains a model for a few steps under an engine, as its own documentation recommends.

A stack is a function of (tuning, engine, folder) that returns the model, its initial values, and DropBP's report and
masks. With `drop_rate=None` it trains without DropBP, which separates limitations of the stack from those of this
library.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import dropbp
from dropbp.cli.examples import collate
from dropbp.integrations.transformers import DropBPCallback
from tests.campaigns.compatibility.models import build, trained_values
from tests.common.tiny import CHAT_TEMPLATE, make_model, make_tokenizer, random_examples

STEPS, BATCH = 6, 2
LAYER = "LlamaDecoderLayer"
COMPILER = "eager"


@dataclasses.dataclass
class Run:
    """The results of a training."""

    model: nn.Module
    before: dict[str, torch.Tensor]
    losses: list[float]
    masks: list[Any]
    report: dict[str, Any]
    processes: int


def world() -> int:
    """Number of processes started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def zero_config() -> dict[str, Any]:
    """Shards even small parameters like these, which ZeRO-3 does not do by default."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def batches(count: int = STEPS) -> Iterator[torch.Tensor]:
    """Each rank has its own data."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    rows = random_examples(count * BATCH, seed=rank)
    for step in range(count):
        yield torch.tensor([row["input_ids"] for row in rows[step * BATCH : (step + 1) * BATCH]])


def checkpoint_blocks(model: Any) -> None:
    """Checkpoint every block, non-reentrant."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters for the optimizer."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# -- a custom loop


def _enabled(tuning: str, engine: str, drop_rate: float | None) -> tuple[Any, Any, dropbp.Handle | None]:
    """The model, its values before training, and the handle, after the set-up on the model itself."""
    model = build(tuning)
    before = trained_values(model)
    if engine == "checkpointing":
        checkpoint_blocks(model)
    handle = None if drop_rate is None else dropbp.enable(model, drop_rate)
    if engine == "compile" and handle is not None:
        dropbp.compile_blocks(handle, backend=COMPILER)
    return model, before, handle


def own_loop(tuning: str, engine: str, folder: Path, drop_rate: float | None) -> Run:
    """Engines set up by hand, with their own functions."""
    model, before, handle = _enabled(tuning, engine, drop_rate)
    if engine == "compile" and handle is None:
        model = torch.compile(model, backend=COMPILER)
    call, backward, step = ENGINES.get(engine, _plain)(model)
    losses, masks = [], []
    for ids in batches():
        loss = call(input_ids=ids, labels=ids).loss
        backward(loss)
        step()
        losses.append(loss.item())
        masks.append(None if handle is None else handle.mask)
    return Run(model, before, losses, masks, {} if handle is None else handle.report(), world())


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), lr=1e-3)


def _plain(model: nn.Module, call: Any = None) -> Any:
    optimizer = _optimizer(model)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return call or model, torch.Tensor.backward, step


def _replicated(model: nn.Module) -> Any:
    return _plain(model, nn.parallel.DistributedDataParallel(model, find_unused_parameters=True))


def _sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer)
    return _plain(fully_shard(model))


def _zero(model: nn.Module) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=_optimizer(model), config=zero_config())
    return engine, engine.backward, engine.step


ENGINES: dict[str, Callable[[nn.Module], Any]] = {"DDP": _replicated, "FSDP2": _sharded, "ZeRO-3": _zero}


# -- trainers


class Notes(TrainerCallback):
    """Masks and losses of a trainer's steps."""

    def __init__(self, callback: DropBPCallback | None) -> None:
        self.callback, self.masks, self.losses = callback, [], []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.masks.append(None if self.callback is None or self.callback.handle is None else self.callback.handle.mask)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in logs else []


def arguments(engine: str, folder: Path) -> dict[str, Any]:
    """Training arguments that set up the engine."""
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": engine != "ZeRO-3",
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": engine == "checkpointing",
    }
    if engine == "DDP":
        options |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": True}
    if engine == "FSDP2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [LAYER]}}
    if engine == "ZeRO-3":
        options["accelerator_config"] = {"use_configured_state": True}  # the only way to a backend with DeepSpeed
        options["deepspeed"] = {**zero_config(), "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    return options


def _trainer_run(
    make: Callable[..., Any], tuning: str, engine: str, folder: Path, drop_rate: float | None, task: str = "CAUSAL_LM"
) -> Run:
    options = arguments(engine, folder)
    if engine == "compile" and drop_rate is None:
        options |= {"torch_compile": True, "torch_compile_backend": COMPILER}
    callback = None if drop_rate is None else DropBPCallback(drop_rate, compile_blocks=_compiling(engine))
    notes = Notes(callback)
    trainer = make(build(tuning, task), options, [notes, *([callback] if callback else [])])
    before = trained_values(trainer.model)
    with callback or contextlib.nullcontext():
        trainer.train()
    report, processes = callback.report() if callback else {}, trainer.accelerator.num_processes
    return Run(trainer.model, before, notes.losses, notes.masks, report, processes)


def _compiling(engine: str) -> dict[str, str] | None:
    return {"backend": COMPILER} if engine == "compile" else None


def _transformers(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Trainer:
    return Trainer(
        model=model,
        args=TrainingArguments(**options),
        train_dataset=random_examples(32),
        data_collator=partial(collate, padding_id=0),
        callbacks=callbacks,
    )


def _of_trl(
    trainer: Any, config: Any, rows: list[dict[str, Any]], model: Any, options: dict[str, Any], callbacks: list[Any],
    **more: Any,
) -> Any:  # fmt: skip
    from datasets import Dataset

    given = {"processing_class": make_tokenizer(), **more}
    args = config(**{"gradient_checkpointing": False, **options})
    return trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), callbacks=callbacks, **given)


def _sft(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = [{"text": f"Add {n} and 1 and say the sum."} for n in range(32)]
    return _of_trl(SFTTrainer, SFTConfig, rows, model, options, callbacks)


def _reference(model: Any) -> Any:
    """With adapters, the model without them is its own reference."""
    return None if hasattr(model, "peft_config") else build("full")


def _dpo(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    from trl import DPOConfig, DPOTrainer

    return _of_trl(DPOTrainer, DPOConfig, _pairs(), model, options, callbacks, ref_model=_reference(model))


def _pairs() -> list[dict[str, Any]]:
    return [{"prompt": f"Add {n} and 1.", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(32)]


def _prompts() -> list[dict[str, Any]]:
    return [{"prompt": f"Add {n} and 1."} for n in range(32)]


def _kto(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": f"Add {n} and 1.", "completion": f" {n + n % 2}", "label": bool(n % 2)} for n in range(32)]
    return _of_trl(KTOTrainer, KTOConfig, rows, model, options, callbacks, ref_model=_reference(model))


def _reward(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    from trl import RewardConfig, RewardTrainer

    return _of_trl(RewardTrainer, RewardConfig, _pairs(), model, options, callbacks)


def _grpo(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    """Two completions per prompt; each batch is trained on twice."""
    from trl import GRPOConfig, GRPOTrainer

    own = {"num_generations": BATCH, "num_iterations": 2, "max_completion_length": 8, **options}
    return _of_trl(GRPOTrainer, GRPOConfig, _prompts(), model, own, callbacks, reward_funcs=_mean_letter)


def _mean_letter(completions: list[str], **_: Any) -> list[float]:
    """Rewards that hardly ever coincide: with equal rewards there is no advantage, and no gradient."""
    return [sum(map(ord, text)) / max(1, len(text)) for text in completions]


def _distillation(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    """Distillation on the student's own text; it calls the backbone, not the whole model."""
    from trl import DistillationConfig, DistillationTrainer

    own = {"max_completion_length": 8, **options}
    teacher = make_model(layers=2, seed=7)
    return _of_trl(DistillationTrainer, DistillationConfig, _prompts(), model, own, callbacks, teacher_model=teacher)


def _gkd(model: Any, options: dict[str, Any], callbacks: list[Any]) -> Any:
    """Half of the batches are the student's own text, half the answers of the data."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    turns = [(f"Add {n} and 1.", str(n + 1)) for n in range(32)]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    own = {"max_new_tokens": 8, "max_length": 64, **options}
    more = {"teacher_model": make_model(layers=2, seed=7), "processing_class": tokenizer}
    return _of_trl(GKDTrainer, GKDConfig, rows, model, own, callbacks, **more)


# -- accelerate


def accelerate_loop(tuning: str, engine: str, folder: Path, drop_rate: float | None) -> Run:
    """The loop in accelerate's documentation, with DropBP enabled before `prepare`."""
    accelerator = _accelerator(engine)
    model, before, handle = _enabled(tuning, engine, drop_rate)
    prepared, optimizer = accelerator.prepare(model, _optimizer(model))
    losses, masks = [], []
    for ids in batches():
        with accelerator.accumulate(prepared):
            loss = prepared(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        masks.append(None if handle is None else handle.mask)
    report = {} if handle is None else handle.report()
    return Run(accelerator.unwrap_model(prepared), before, losses, masks, report, accelerator.num_processes)


def _accelerator(engine: str) -> Any:
    flag = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
    gloo = accelerate.InitProcessGroupKwargs(backend="gloo" if world() > 1 else None)
    if engine == "ZeRO-3":
        plugin = accelerate.DeepSpeedPlugin(hf_ds_config=zero_config())
        return accelerate.Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
    if engine == "FSDP2":
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[LAYER]
        )
        return accelerate.Accelerator(cpu=True, fsdp_plugin=plugin, kwargs_handlers=[flag, gloo])
    return accelerate.Accelerator(cpu=True, kwargs_handlers=[flag, gloo])


STACKS: dict[str, Callable[[str, str, Path, float | None], Run]] = {
    "your own loop": own_loop,
    "accelerate": accelerate_loop,
    "transformers Trainer": partial(_trainer_run, _transformers),
    "TRL SFTTrainer": partial(_trainer_run, _sft),
    "TRL DPOTrainer": partial(_trainer_run, _dpo),
    "TRL KTOTrainer": partial(_trainer_run, _kto),
    "TRL RewardTrainer": partial(_trainer_run, _reward, task="SEQ_CLS"),
    "TRL GRPOTrainer": partial(_trainer_run, _grpo),
    "TRL DistillationTrainer": partial(_trainer_run, _distillation),
    "TRL GKDTrainer": partial(_trainer_run, _gkd),
}
# Tried in one process, alone and with checkpointing: in several processes DropBP meets nothing that SFT and DPO do
# not cover.
IN_ONE_PROCESS = tuple(STACKS)[5:]
