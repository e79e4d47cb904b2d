"""One training run through the Trainer of transformers, and everything measured in it, as one plain record."""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState

from dropbp.cli.examples import Example, collate, collate_left
from dropbp.cli.probe import probe_step
from dropbp.cli.resuming import ResumeCheck, check_trainer_state, check_weights, refusing_damage
from dropbp.device import Device, get_device
from dropbp.engine.labelled import labelled_logits
from dropbp.errors import ConfigError, DeviceError, DropBPError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dropbp.integrations.transformers import DropBPCallback

logger = logging.getLogger(__name__)

_EVALUATIONS = 10


@dataclass(frozen=True)
class Settings:
    """The settings of a run apart from model and data; `max_steps` None means `epochs` count."""

    output: Path
    learning_rate: float
    weight_decay: float
    batch_size: int
    gradient_accumulation: int = 1
    epochs: float = 1.0
    max_steps: int | None = None
    warmup_steps: int = 100
    schedule: str = "cosine"
    eval_steps: int | None = None
    save_steps: int | None = None
    keep_checkpoints: bool = True
    gradient_checkpointing: bool = False
    bf16: bool = False
    seed: int = 0
    device: str | None = None
    report_to: str = "none"

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of the whole run."""
        per_epoch = math.ceil(math.ceil(examples / self.batch_size) / self.gradient_accumulation)
        return self.max_steps or max(1, math.ceil(per_epoch * self.epochs))


@dataclass(frozen=True)
class Job:
    """A model and the data to train it on; no `evaluation` means no evaluation.

    `labelled` computes logits only where a label is, and pads on the left, so that these are few positions.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    evaluation: Sequence[Example] = ()
    labelled: bool = False


def train(
    job: Job, settings: Settings, callback: DropBPCallback | None = None, resume_from: str | None = None
) -> dict[str, Any]:
    """Train the job's model in place, evaluate and measure; without a callback of DropBP, plainly.

    The record holds the configuration, raw step times, evaluations, FLOPs and memory, in JSON types only. Raises
    ConfigError if logits are wanted only where a label is and the model cannot compute them so, DeviceError if the
    trainer would use another device than was asked for, StateError if the checkpoint is damaged or of another run.
    """
    recorder = StepRecorder(job.name, _inputs(job, settings))
    callbacks: list[TrainerCallback] = [*([callback] if callback else []), recorder]
    if resume_from is not None:
        check_trainer_state(Path(resume_from))
        check_weights(Path(resume_from), job.model)
        callbacks.insert(0, ResumeCheck(resume_from, callback is not None))
    logits = labelled_logits(job.model, evaluation=True) if job.labelled else nullcontext()
    with logits, closing(recorder), closing(callback) if callback else nullcontext():
        trainer = _trainer(job, settings, callbacks, resume_from is None)
        with suppress(_NoStepLeftError), refusing_damage(resume_from):
            trainer.train(resume_from_checkpoint=resume_from)
        return _record(trainer, job, settings, recorder, callback)


class _NoStepLeftError(Exception):
    """The checkpoint is that of the last step, and transformers would take one more if it lies within an epoch."""


class StepRecorder(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Time, tokens and losses of each step, kept over a resume; a progress bar on standard error.

    The time of a step is that of forward, backward, optimizer and whatever the callbacks before this one do, a
    calibration for example; the next batch and evaluations are outside. `inputs` says what each step takes; where a
    resumed run takes something else, a warning says so.
    """

    def __init__(self, name: str, inputs: Mapping[str, str]) -> None:
        self.name, self.inputs = name, dict(inputs)
        self.step_s: list[float] = []
        self.tokens: list[int] = []
        self.train_losses: list[dict[str, float]] = []
        self.evaluations: list[dict[str, float]] = []
        self._tokens_before = 0
        self._begin_s = 0.0
        self._bar: Any = None
        self._device: Device | None = None

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint saves."""
        names = ("step_s", "tokens", "train_losses", "evaluations", "inputs")
        return {"args": {"name": self.name}, "attributes": {name: copy(getattr(self, name)) for name in names}}

    def close(self) -> None:
        """End the progress bar."""
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            self.continue_record(saved)
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._device = get_device(args.device)
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def continue_record(self, saved: Mapping[str, Any]) -> None:
        """Continue the record of a checkpoint, and warn of inputs that differ from those of its run."""
        record, inputs = saved["attributes"], saved["attributes"].get("inputs", {})
        self.step_s, self.tokens = list(map(float, record["step_s"])), list(map(int, record["tokens"]))
        self.train_losses, self.evaluations = (list(map(dict, record[n])) for n in ("train_losses", "evaluations"))
        self._tokens_before = sum(self.tokens)
        for name, now in self.inputs.items():
            before = inputs.get(name, now)
            if before != now:
                logger.warning("--resume: the %s changes from %s to %s for the rest of the run.", name, before, now)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise _NoStepLeftError

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._begin_s = self._now_s()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.step_s.append(self._now_s() - self._begin_s)
        self.tokens.append(int(state.num_input_tokens_seen) - self._tokens_before)
        self._tokens_before += self.tokens[-1]
        self._bar.update(1)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.train_losses.append({"step": state.global_step, "loss": logs["loss"]})
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        loss = float(kwargs["metrics"]["eval_loss"])
        point = {"step": state.global_step, "train_s": sum(self.step_s), "tokens": sum(self.tokens), "loss": loss}
        earlier = [other for other in self.evaluations if other["step"] < state.global_step]
        self.evaluations = [*earlier, point]

    def _now_s(self) -> float:
        if self._device is not None:
            self._device.synchronize()
        return time.perf_counter()


def _inputs(job: Job, settings: Settings) -> dict[str, str]:
    hashed = blake2b(digest_size=4)
    for example in job.train:
        for ids in (example["input_ids"], example["labels"]):
            hashed.update(array("q", ids))
    return {
        "training data": f"{len(job.train)} examples (hash {hashed.hexdigest()})",
        "number of examples per micro-batch": str(settings.batch_size),
        "number of micro-batches per step": str(settings.gradient_accumulation),
    }


def _trainer(job: Job, settings: Settings, callbacks: list[TrainerCallback], from_scratch: bool) -> Trainer:
    with _refusing_what_does_not_fit():
        trainer = Trainer(
            model=job.model,
            args=_arguments(settings, len(job.train), bool(job.evaluation), from_scratch),
            train_dataset=list(job.train),
            eval_dataset=list(job.evaluation) or None,
            data_collator=partial(collate_left if job.labelled else collate, padding_id=job.tokenizer.pad_token_id),
            processing_class=job.tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(PrinterCallback)  # it prints every log line; the recorder's bar shows what matters
    return trainer


@contextmanager
def _refusing_what_does_not_fit() -> Iterator[None]:
    """Turn errors about combinations of options, of any type that the trainer raises, into ConfigError."""
    try:
        yield
    except (DropBPError, ImportError):
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip()
        raise ConfigError(f"the options contradict each other, or do not suit this machine: {reason}") from error


def _arguments(settings: Settings, examples: int, evaluates: bool, from_scratch: bool) -> TrainingArguments:
    steps = settings.total_steps(examples)
    arguments = TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        lr_scheduler_type=settings.schedule,
        warmup_steps=min(settings.warmup_steps, steps // 10),
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs,
        optim="adamw_torch",
        bf16=settings.bf16,
        seed=settings.seed,
        # a trainer refuses bf16 on the CPU unless it is told that the CPU is meant
        use_cpu=(settings.device or TrainingArguments().device.type) == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **_checkpointing(settings.gradient_checkpointing),
        **_events(settings, max(1, steps // _EVALUATIONS), evaluates, from_scratch),
    )
    if settings.device is not None:
        _check_device(settings.device, arguments)
    return arguments


def _events(settings: Settings, every: int, evaluates: bool, from_scratch: bool) -> dict[str, Any]:
    """When to evaluate, save and log, by default at the end of every tenth of the run."""
    return {
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": settings.eval_steps or every,
        "eval_on_start": evaluates and from_scratch,
        "prediction_loss_only": True,
        "save_strategy": "steps" if settings.keep_checkpoints else "no",
        "save_steps": settings.save_steps or every,
        "save_total_limit": 2,
        "logging_steps": min(10, every),
        "disable_tqdm": True,
        "report_to": settings.report_to,
        "include_num_input_tokens_seen": True,
    }


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """The option under the name it has in the installed transformers."""
    known = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def _check_device(asked: str, arguments: TrainingArguments) -> None:
    get_device(asked)
    if asked.partition(":")[0] != arguments.device.type:
        raise DeviceError(
            f"--device is {asked}, but the trainer would use {arguments.device}. Pass that device, or make {asked} "
            "visible to the trainer."
        )


def _record(
    trainer: Trainer, job: Job, settings: Settings, recorder: StepRecorder, callback: DropBPCallback | None
) -> dict[str, Any]:
    return {
        "name": job.name,
        "settings": {**asdict(settings), "output": str(settings.output)},
        "drop_rate": callback.drop_rate if callback else 0.0,
        "masks": callback.masks if callback else None,
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "trainable_parameters": sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        "steps": len(recorder.step_s),
        "step_s": recorder.step_s,
        "tokens": recorder.tokens,
        "train_losses": recorder.train_losses,
        "evaluations": recorder.evaluations,
        "calibrated_steps": callback.calibrated_steps if callback else [],
        "calibration_s": callback.calibration_s if callback else 0.0,
        "dropbp": callback.report() if callback else None,
        **probe_step(trainer, callback),
    }
