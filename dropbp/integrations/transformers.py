"""`DropBPCallback`: DropBP in a trainer of transformers, with one line in `callbacks=[…]`.

It works wherever `transformers.Trainer` calls its callbacks: in `Trainer` itself and in TRL's `SFTTrainer`,
`DPOTrainer` and similar, from transformers 4.55 on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import nn

from dropbp.device import get_device
from dropbp.errors import DiscoveryError, DropBPError, MissingDependencyError, StateError
from dropbp.files import write_text
from dropbp.handle import Handle
from dropbp.integrations.batches import batch_for, with_media
from dropbp.integrations.by_branch import ByBranch, is_sharded
from dropbp.integrations.callers import calling_handler, calling_trainer, frame_of_train, put_first
from dropbp.integrations.progress import Position, StepClock, as_steps, calibration_point, check_schedule, length_of
from dropbp.integrations.replay import LossReplay
from dropbp.session import check_options, compile_blocks, enable

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerState
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.training_args import TrainingArguments
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"DropBPCallback needs {error.name}, which is not installed; install it with: pip install 'dropbp[hf]'."
    ) from error

logger = logging.getLogger(__name__)

STATE_FILE = "dropbp.json"
CALIBRATION_BATCHES = 4  # micro-batches of the step; sensitivities differ between batches


class DropBPCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Enables DropBP when training begins and removes it when training ends.

    Each checkpoint holds the state (rates, masks, counts), in `trainer_state.json` and in a separate file
    `dropbp.json`. A resumed run draws the masks that the uninterrupted one would have drawn.

    Args:
        drop_rate: mean share of the branches' backward FLOPs to skip, in [0, 1).
        masks: the mask sampler; see `dropbp.enable`.
        resample: `"forward"` draws a mask for each micro-batch, `"step"` one for each optimizer step.
        calibrate_at: when to set rates from sensitivities: a share of training (a float below 1; the paper's is 0.1) or
            an optimizer step (an int). None keeps the initial rates. `"auto"` is 0.1, but None under `nested` masks,
            whose depth profile does better without (docs/learning.md).
        recalibrate_every: repeat that after this many optimizer steps, or this share of training.
        warmup_steps: optimizer steps at the beginning that drop nothing.
        compile_blocks: options of `torch.compile` for compiling each block separately, as `dropbp.compile_blocks` does.
            An empty dict uses the defaults; None compiles nothing. Leave `torch_compile` of the training arguments off
            then.
        group_parameters: whether optimizer and clipping work branch by branch, so that a lazy device compiles nothing
            new for a new mask; None leaves it to the device. The result is the same.
        log: add `dropbp_*` figures to the trainer's own log, and so to TensorBoard, W&B and the like.
        **options: passed on to `dropbp.enable`. By default `rehearse` is on for a lazy device, and `steps` is the
            length of the training, so that nested masks anneal with the trainer's progress; `steps=None` prevents that.
            If a forward needs `example_inputs`, the first rows of the training data are used (docs/integrations.md).

    After an exception inside `train()`, no trainer calls its callbacks. Then `close()`, leaving a `with` block around
    the callback, or the next `train()` removes DropBP from the model.
    """

    def __init__(
        self,
        drop_rate: float = 0.5,
        *,
        masks: str = "nested",
        resample: str = "forward",
        calibrate_at: float | int | str | None = "auto",
        recalibrate_every: float | int | None = None,
        warmup_steps: int = 0,
        compile_blocks: Mapping[str, Any] | None = None,
        group_parameters: bool | None = None,
        log: bool = True,
        **options: Any,
    ) -> None:
        check_schedule(resample, calibration_point(calibrate_at, masks), recalibrate_every, warmup_steps)
        check_options(drop_rate, masks, options)
        self.drop_rate, self.masks, self.resample, self.options = drop_rate, masks, resample, options
        self.calibrate_at, self.recalibrate_every = calibration_point(calibrate_at, masks), recalibrate_every
        self.warmup_steps, self.log = warmup_steps, log
        self.compile_blocks, self.group_parameters = compile_blocks, group_parameters
        self.snapshot: dict[str, Any] | None = None
        self.calibrated_steps: list[int] = []
        self.calibration_s = 0.0
        self._handle: Handle | None = None
        self._replay: LossReplay | None = None
        self._by_branch: ByBranch | None = None
        self._compiled: list[nn.Module] = []
        self._last_report: dict[str, Any] = {}
        self._clock = StepClock()
        self._train: FrameType | None = None
        self._thread = threading.get_ident()
        self._position = Position(1, 1, None)

    @property
    def handle(self) -> Handle | None:
        """The handle of `dropbp.enable` while training runs, else None."""
        return self._handle

    def report(self) -> dict[str, Any]:
        """The handle's report: the current one during training, afterwards that of the end of the last training."""
        if self._handle is not None:
            self._last_report = dict(self._handle.report())
        return self._last_report

    @contextlib.contextmanager
    def enabled(self, model: nn.Module) -> Iterator[Handle]:
        """Enable a model as in the last training, with the rates it ended with, for forwards that are no run."""
        with enable(model, self.drop_rate, masks=self.masks, **self.options) as handle:
            handle.set_rates([branch["rate"] for branch in self.report()["branches"]])
            untouched = handle.state_dict()
            yield handle
            handle.load_state_dict(untouched)  # so that a few forwards do not count as a run that misses its budget

    def close(self) -> None:
        """Remove DropBP from the model. Does nothing if it is not enabled."""
        self._train = None
        if self._replay is not None:
            self._replay.release()
            self._replay = None
        if self._by_branch is not None:
            self._by_branch.remove()
            self._by_branch = None
        for block in self._compiled:
            block._compiled_call_impl = None
        self._compiled = []
        if self._handle is not None:
            self.report()
            self.snapshot = self._snapshot()
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> DropBPCallback:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state(self) -> dict[str, Any]:
        """The state that the trainer writes into `trainer_state.json`."""
        return {"args": self._arguments(), "attributes": {"snapshot": self._snapshot()}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Enable DropBP on the model, in the state of the checkpoint if there is one."""
        self.close()  # in case an earlier training did not end properly
        put_first(self)
        loader = kwargs.get("train_dataloader")
        self._position = Position(state.max_steps, args.gradient_accumulation_steps, length_of(loader))
        self._enable(_unwrapped(kwargs["model"]), loader)
        try:
            self._restore(_saved_snapshot(state) if state.global_step else None)
            self._note_optimizer(kwargs.get("optimizer"))
        except DropBPError:
            self.close()
            raise
        self._cut_by_branch()
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._clock = StepClock()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Draw a mask for the step if `resample` says so, and prepare a calibration if it is due."""
        if self._handle is None:
            return
        self._position.begin_step(state.global_step)
        self._report_progress()
        if self.resample == "step":
            self._handle.resample()
        if self._calibration_due(state.global_step + 1, state.max_steps):
            self._replay = LossReplay(_unwrapped(kwargs["model"]), CALIBRATION_BATCHES)
        self._clock.begin()

    def on_substep_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Report the progress of the training between the micro-batches of a step."""
        self._position.end_micro_batch()
        self._report_progress()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Calibrate if it is due: the gradients are no longer needed."""
        self._clock.end()
        if self._replay is not None:
            self._calibrate(state.global_step)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Tell the activation cache that every row was seen once."""
        if self._handle is not None and self._handle.cache is not None:
            self._handle.cache.end_epoch()

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add DropBP's figures to the trainer's log."""
        if self._handle is None or not self.log or not logs or not ({"loss", "train_runtime"} & logs.keys()):
            return
        figures = self._figures()
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)  # the trainer has stored a copy before calling its callbacks

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write a separate file into the checkpoint, for other readers."""
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._handle is not None and state.is_world_process_zero and folder.is_dir():
            write_text(folder / STATE_FILE, json.dumps(self.state(), indent=1) + "\n")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Remove DropBP from the model."""
        self.close()

    def _enable(self, model: nn.Module, loader: Any) -> None:
        lazy = get_device(self.options.get("device"), model).is_lazy()
        draws = self._position.draws
        steps = max(1, draws(self.resample) - draws(self.resample, self.warmup_steps))
        options = {"resample": self.resample, "steps": steps, "rehearse": lazy, **self.options}
        self._handle = self._enabled(model, options, loader)
        self._train, self._thread = frame_of_train(self), threading.get_ident()
        self._handle.engine.is_abandoned = self._closed_as_train_ended
        if self.compile_blocks is not None:
            names = compile_blocks(self._handle, **self.compile_blocks)
            self._compiled = [self._handle.model.get_submodule(name) for name in names]

    def _closed_as_train_ended(self) -> bool:
        """Before each forward: close if `train()` is no longer on the call stack, because an exception ended it."""
        if self._train is None or self._thread != threading.get_ident():
            return False
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self._train:
            frame = frame.f_back
        if frame is None:
            self.close()
        return frame is None

    def _enabled(self, model: nn.Module, options: dict[str, Any], loader: Any) -> Handle:
        """Enable the model, with a batch of the run as example if the model does not describe all its inputs."""
        options = with_media(options, loader, model)
        try:
            return enable(model, self.drop_rate, masks=self.masks, **options)
        except DiscoveryError as failure:
            if loader is None or options.get("example_inputs") is not None:
                raise
            logger.debug("no branches found without a batch: %s", failure)
            options = {**options, "example_inputs": batch_for(loader, model, failure)}
        return enable(model, self.drop_rate, masks=self.masks, **options)

    def _report_progress(self) -> None:
        """Report the finished share of the training, without the warm-up, to the handle."""
        if self._handle is not None:
            share = self._position.share_after(self.warmup_steps)
            self._handle.progress(max(0.0, share), dropping=share >= 0)

    def _note_optimizer(self, optimizer: Any) -> None:
        if self._handle is not None and getattr(optimizer, "param_groups", None):
            self._handle.note_optimizer(optimizer)

    def _cut_by_branch(self) -> None:
        if self._handle is None or not self._wants_groups(self._handle):
            return
        trainer = calling_trainer(calling_handler(self))
        if trainer is None or is_sharded(trainer):
            logger.warning("Optimizer and clipping are not split by branch, so a lazy device recompiles for new masks.")
            return
        self._by_branch = ByBranch(self._handle, trainer)

    def _wants_groups(self, handle: Handle) -> bool:
        if self.group_parameters is not None:
            return self.group_parameters
        return handle.device.defaults().group_parameters and not handle.fills_gradients

    def _restore(self, snapshot: dict[str, Any] | None) -> None:
        self.calibrated_steps, self.calibration_s = [], 0.0
        if snapshot is None or self._handle is None:
            return
        with _refusing_damage():
            saved, steps = snapshot["handle"], [int(step) for step in snapshot["calibrated_steps"]]
            seconds = float(snapshot["calibration_s"])
        self._handle.load_state_dict(saved)
        self.calibrated_steps, self.calibration_s = steps, seconds

    def _snapshot(self) -> dict[str, Any] | None:
        if self._handle is None:
            return self.snapshot
        counts = {"calibrated_steps": self.calibrated_steps, "calibration_s": self.calibration_s}
        return {"handle": self._handle.state_dict(), **counts}

    def _arguments(self) -> dict[str, Any]:
        names = ("drop_rate", "masks", "resample", "calibrate_at", "recalibrate_every", "warmup_steps", "log")
        return {name: getattr(self, name) for name in names} | {k: v for k, v in self.options.items() if _is_json(v)}

    def _calibration_due(self, step: int, max_steps: int) -> bool:
        if self.calibrate_at is None or self.drop_rate == 0:
            return False
        if self.calibrated_steps:
            again = self.recalibrate_every
            return again is not None and step >= self.calibrated_steps[-1] + as_steps(again, max_steps)
        return step >= max(as_steps(self.calibrate_at, max_steps), self.warmup_steps + 1)

    def _calibrate(self, step: int) -> None:
        replay, self._replay = self._replay, None
        if replay is None or self._handle is None:
            return
        begin_s = time.perf_counter()
        try:
            self._handle.calibrate(replay.closures())
        except StateError as error:  # for example a loss that is not finite: no reason to end the training
            logger.warning("Calibration failed at step %d, and the drop rates stay as they are: %s", step, error)
        replay.release()
        self.calibrated_steps.append(step)
        self.calibration_s += time.perf_counter() - begin_s

    def _figures(self) -> dict[str, float]:
        report = self.report()
        cache = self._handle.cache if self._handle is not None else None
        return {
            "dropbp_realised_drop_rate": report["realised_drop_rate"],
            "dropbp_backward_saved_share": report["realised_drop_rate"] * report["branch_flops_share"],
            "dropbp_step_s": self._clock.mean_s(),
            "dropbp_calibration_s": self.calibration_s,
            **({} if cache is None else cache.figures()),
        }


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _unwrapped(model: nn.Module) -> nn.Module:
    from accelerate.utils import extract_model_from_parallel

    unwrapped: nn.Module = extract_model_from_parallel(model)
    return unwrapped


def _saved_snapshot(state: TrainerState) -> dict[str, Any] | None:
    saved = state.stateful_callbacks.get(DropBPCallback.__name__)
    with _refusing_damage():
        newest = saved[-1] if isinstance(saved, list) else saved
        return None if newest is None else newest["attributes"]["snapshot"]


@contextlib.contextmanager
def _refusing_damage() -> Iterator[None]:
    try:
        yield
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        raise StateError(
            f"DropBP's part of the checkpoint is damaged ({type(error).__name__}: {error}); nothing was loaded. Resume "
            "from an earlier checkpoint."
        ) from error
