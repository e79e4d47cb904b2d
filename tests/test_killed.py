"""A training killed by the system at a random step, and resumed: equal to the bit to one that ran through.

`python -m tests.test_killed FOLDER STEP` is the training that kills itself in the middle of that step.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from dropbp.integrations.transformers import DropBPCallback
from tests.test_callback import Watcher, losses, make_trainer

STEPS, SAVED_EVERY = 12, 3
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": SAVED_EVERY,
    "logging_steps": 1,
    "gradient_accumulation_steps": 2,
}


class Killer(TrainerCallback):
    """No exception, no clean-up: between two micro-batches of a step the process is gone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def make_callback() -> DropBPCallback:
    # Calibration in step 2: its rates must come back, and it must not be made again.
    return DropBPCallback(masks="exact", calibrate_at=2)


def train_until_killed(folder: Path, step: int) -> None:
    torch.set_num_threads(1)
    make_trainer(folder, [make_callback(), Killer(step)], **OPTIONS).train()


def test_a_run_killed_at_a_random_step_equals_an_uninterrupted_one_when_resumed(tmp_path: Path) -> None:
    step = random.SystemRandom().randint(SAVED_EVERY + 1, STEPS)
    command = [sys.executable, "-m", "tests.test_killed", str(tmp_path / "cut"), str(step)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[1], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    saved = SAVED_EVERY * ((step - 1) // SAVED_EVERY)
    checkpoint = get_last_checkpoint(str(tmp_path / "cut"))
    assert checkpoint is not None and checkpoint.endswith(f"-{saved}"), f"killed in step {step}"
    whole, whole_masks, whole_report = run_through(tmp_path / "whole", None)
    rest, rest_masks, rest_report = run_through(tmp_path / "cut", checkpoint)
    assert rest_masks == whole_masks[2 * saved :], f"killed in step {step}"
    assert losses(rest) == losses(whole), f"killed in step {step}"
    assert rest_report == whole_report
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def run_through(folder: Path, checkpoint: str | None) -> tuple[Any, list[Any], dict[str, Any]]:
    callback = make_callback()
    watcher = Watcher(callback)
    trainer = make_trainer(folder, [watcher, callback], **OPTIONS)
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer, watcher.masks, callback.report()


if __name__ == "__main__":
    train_until_killed(Path(sys.argv[1]), int(sys.argv[2]))
