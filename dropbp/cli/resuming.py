"""Resuming a fine-tuning: a checkpoint that does not fit is refused with the name of its file, before any step."""

from __future__ import annotations

import json
import logging
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dropbp.checks import is_number
from dropbp.errors import DropBPError, StateError, as_resource_error
from dropbp.files import LAST_WRITTEN
from dropbp.integrations.transformers import DropBPCallback

logger = logging.getLogger(__name__)

ADAPTERS, ADAPTER_CONFIG, WHOLE_MODEL = "adapter_model.safetensors", "adapter_config.json", "model*.safetensors"
_READ_BY = {  # functions of transformers.Trainer that read a checkpoint
    "_load_from_checkpoint": "its weights",
    "load_from_json": "its trainer_state.json",
    "_load_optimizer_and_scheduler": "its optimizer.pt or scheduler.pt",
    "_load_rng_state": "its rng_state.pth",
    "_load_callback_state": "its trainer_state.json",
    "continue_record": "its trainer_state.json",
}
_NUMBERS = (
    "global_step", "max_steps", "num_train_epochs", "eval_steps", "save_steps", "logging_steps",
    "num_input_tokens_seen", "total_flos", "train_batch_size",
)  # fmt: skip
_OPTIONAL = {"stateful_callbacks": dict, "log_history": list, "best_model_checkpoint": str}
_NUMBER = re.compile(r"\d+")
_OPTIONS = "Resume with the options of the run that wrote it, or start a new run with another --output."
_DELETE = "If the options are those of the run that wrote it, delete this folder to resume from the one before it."


def check_trainer_state(checkpoint: Path) -> None:
    """Raises StateError if an entry of trainer_state.json that the trainer uses is not of its type."""
    state = json.loads((checkpoint / LAST_WRITTEN).read_text(encoding="utf-8"))
    whole = all(isinstance(state.get(name), (kind, type(None))) for name, kind in _OPTIONAL.items())
    numbers = (state.get(name, 0) for name in _NUMBERS)
    if not whole or not all(is_number(value) and abs(value) < 1e300 for value in numbers):
        raise _damaged(LAST_WRITTEN, checkpoint)


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """Compare the names and shapes of the weights in a checkpoint with those of the model.

    transformers may save a whole model under other names than its own. So there, a missing name counts only if it
    differs from a common one by numbers alone, as those of further layers do.

    Raises:
        StateError: the checkpoint is that of another model, or of a run with another `--peft`.
    """
    adapted, has_adapters = hasattr(model, "peft_config"), (checkpoint / ADAPTERS).is_file()
    if any(path.is_dir() for path in checkpoint.iterdir()) or not (has_adapters or _files(checkpoint)):
        return  # weights of a sharded engine, or of an older format
    if adapted != has_adapters:
        held, peft = ("adapters", "lora") if has_adapters else ("a whole model", "none")
        raise StateError(f"--resume: {checkpoint} holds {held}. Pass --peft {peft}, or another --output for a new run.")
    mine = _adapter_shapes(model) if adapted else {name: list(t.shape) for name, t in model.state_dict().items()}
    saved = _saved_shapes([checkpoint / ADAPTERS] if adapted else _files(checkpoint))
    names = mine.keys() | saved.keys() if adapted else _comparable(model.state_dict(), saved)
    _refuse_other_shapes(checkpoint, mine, saved, names)
    if adapted:
        _warn_of_another_base(checkpoint, model)


@contextmanager
def refusing_damage(checkpoint: str | None) -> Iterator[None]:
    """Turn errors of the trainer while it reads a checkpoint into StateError, which names the file."""
    try:
        yield
    except DropBPError:
        raise
    except Exception as error:
        called = (frame.name for frame in traceback.extract_tb(error.__traceback__))
        file = next((_READ_BY[name] for name in called if name in _READ_BY), None)
        if checkpoint is None or file is None or as_resource_error(error) is not None:
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise StateError(
            f"--resume: {checkpoint} does not fit this run, or is damaged: {file} cannot be loaded "
            f"({type(error).__name__}: {reason}). {_DELETE}"
        ) from error


class ResumeCheck(TrainerCallback):  # type: ignore[misc]
    """Checks what was loaded from a checkpoint, before the first step.

    Args:
        checkpoint: its folder.
        drops: whether the resumed run uses DropBP.
    """

    def __init__(self, checkpoint: str, drops: bool) -> None:
        self._checkpoint, self._drops = checkpoint, drops

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.stateful_callbacks.setdefault("TrainerControl", control.state())  # the trainer saves it by this key
        self._check_finite("weight", kwargs["model"].named_parameters())
        states = getattr(kwargs.get("optimizer"), "state", {}).values()
        self._check_finite("optimizer state", (item for parts in states for item in dict(parts).items()))
        scheduler = kwargs.get("lr_scheduler")
        scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
        rates = getattr(scheduler, "base_lrs", [args.learning_rate])
        self._check_numbers(
            "scheduler.pt", rates, getattr(scheduler, "last_epoch", 0), getattr(scheduler, "_step_count", 0)
        )
        self._warn_if_changed("learning rate", rates[0], args.learning_rate)
        self._warn_if_changed("number of steps between evaluations", state.eval_steps, args.eval_steps)
        self._warn_if_changed("number of steps between checkpoints", state.save_steps, args.save_steps)
        if not self._drops and DropBPCallback.__name__ in state.stateful_callbacks:
            logger.warning("--resume: %s is of a run with DropBP; the rest of it runs without.", self._checkpoint)

    def _warn_if_changed(self, what: str, saved: float, asked: float) -> None:
        """Warn of a setting that differs from that in the checkpoint, because a trainer takes the saved one."""
        if saved != asked:
            logger.warning("--resume: the %s stays %g, as in %s.", what, saved, self._checkpoint)

    def _check_numbers(self, file: str, values: Any, *more: Any) -> None:
        if not isinstance(values, list) or not all(map(is_number, (*values, *more))):
            raise _damaged(file, self._checkpoint)

    def _check_finite(self, kind: str, values: Iterable[tuple[str, Any]]) -> None:
        for name, value in values:
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise StateError(
                    f"--resume: {self._checkpoint} holds the {kind} {name} with values that are not finite. Delete "
                    "this folder to resume from the one before it, or start a new run with a lower --learning-rate."
                )


def _damaged(file: str, checkpoint: Path | str) -> StateError:
    return StateError(f"--resume: {file} of {checkpoint} is damaged. {_DELETE}")


def _comparable(mine: Mapping[str, Tensor], saved: Mapping[str, Any]) -> set[str]:
    """The common names, and those that differ from one of them by numbers alone. A tied weight is saved once."""
    common = mine.keys() & saved.keys()
    held, kinds = {mine[name].data_ptr() for name in common}, {_NUMBER.sub("#", name) for name in common}
    missing = {name for name in mine.keys() - common if mine[name].data_ptr() not in held} | (saved.keys() - common)
    return common | {name for name in missing if _NUMBER.sub("#", name) in kinds}


def _files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob(WHOLE_MODEL))


def _adapter_shapes(model: nn.Module) -> dict[str, list[int]]:
    from peft import get_peft_model_state_dict

    return {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}


def _saved_shapes(files: Iterable[Path]) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in files:
        with safe_open(file, "pt") as saved:
            shapes |= {name: saved.get_slice(name).get_shape() for name in saved.keys()}  # noqa: SIM118
    return shapes


def _refuse_other_shapes(
    checkpoint: Path, mine: dict[str, list[int]], saved: dict[str, list[int]], names: Iterable[str]
) -> None:
    for name in sorted(names):
        if mine.get(name) != saved.get(name):
            there, here = (shapes.get(name, "missing") for shapes in (saved, mine))
            raise StateError(
                f"--resume: {checkpoint} is of another model and cannot be loaded: {name} is {there} there and {here} "
                f"here. {_OPTIONS}"
            )


def _warn_of_another_base(checkpoint: Path, model: Any) -> None:
    config = json.loads((checkpoint / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    saved, mine = config.get("base_model_name_or_path"), model.active_peft_config.base_model_name_or_path
    if saved != mine:
        logger.warning(
            "--resume: the adapters of %s were trained on %s, and --model is %s. They fit only the same weights.",
            checkpoint, saved, mine,
        )  # fmt: skip
