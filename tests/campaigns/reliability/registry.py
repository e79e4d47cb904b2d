"""The faults and inputs: one entry per line of docs/reliability.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaigns.reliability import commands, endurance, engine, fuzz, processes


@dataclass(frozen=True)
class Check:
    """A check that raises AssertionError if it fails, and otherwise returns figures.

    Attributes:
        part: heading in the page.
        does: what is injected or tried.
        holds: what must hold afterwards.
        run: called with a count and an empty folder.
        few, many: the count in the tests, and in the full run.
    """

    part: str
    does: str
    holds: str
    run: Callable[[int, Path], dict[str, Any]]
    few: int
    many: int


FAULTS, INPUTS, LEAKS, LONG = "Faults", "Bad input", "Leaks", "Long runs"

CHECKS: dict[str, Check] = {
    "kill": Check(
        FAULTS,
        "`kill -9` of `dropbp finetune` at random moments, mostly while it writes a checkpoint",
        "`--resume` continues from the last whole checkpoint; losses, masks and weights equal an uninterrupted run's",
        processes.killed,
        2,
        36,
    ),
    "interrupt": Check(
        FAULTS,
        "Ctrl-C at random moments of every command",
        "exit status 130 and one line, which names the kept checkpoint; no traceback",
        processes.interrupted,
        6,
        40,
    ),
    "disk": Check(
        FAULTS,
        "the disk is full while `dropbp finetune` writes its files",
        "exit status 1 and one line; the previous checkpoint is whole",
        processes.file_limit,
        2,
        30,
    ),
    "rank": Check(
        FAULTS,
        "`kill -9` of one of two ranks in forward, backward or optimizer step, DDP over gloo",
        "the other rank ends with an error within the group's timeout; DropBP can be removed from its model",
        processes.rank_dies,
        3,
        18,
    ),
    "state-file": Check(
        FAULTS,
        "writing a state file fails at a random byte",
        "the earlier file stays, and no other is left behind",
        engine.full_disk,
        50,
        1000,
    ),
    "forward": Check(
        FAULTS,
        "out of memory, an exception or Ctrl-C at a random place in the forward, with and without checkpointing",
        "the next step's gradients are the paper's; after `remove` the model is plain",
        lambda count, folder: engine.in_training(count, "forward"),
        15,
        500,
    ),
    "backward": Check(
        FAULTS,
        "the same in the backward",
        "the same",
        lambda count, folder: engine.in_training(count, "backward"),
        15,
        500,
    ),
    "calibration": Check(
        FAULTS,
        "the same in the forward or backward of a calibration, one-pass and exact",
        "gradients, parameters, rates, modes and random state are as before",
        lambda count, folder: engine.in_calibration(count),
        20,
        500,
    ),
    "loss": Check(
        FAULTS,
        "an exception in the user's loss, in training and in a calibration",
        "the same",
        lambda count, folder: engine.in_the_loss(count),
        20,
        500,
    ),
    "not-finite": Check(
        FAULTS,
        "NaN and infinite losses, inputs and gradients",
        "calibration refuses them and changes nothing; the next step is right",
        lambda count, folder: engine.not_finite(count),
        20,
        500,
    ),
    "functions": Check(
        INPUTS,
        "every public function and option with invalid values, and states with one damaged entry",
        "success, or an error of `dropbp.errors`; a refused call changes nothing, nor the global random state",
        lambda count, folder: fuzz.fuzz(count),
        300,
        30000,
    ),
    "command-lines": Check(
        INPUTS,
        "options of `dropbp finetune` and `inspect` with random values",
        "exit status 0, or exit status 2 and one line",
        commands.command_lines,
        8,
        200,
    ),
    "files": Check(
        INPUTS,
        "garbage data sets in every format; models with a file that is missing, truncated or garbage",
        "the same",
        commands.files,
        15,
        400,
    ),
    "checkpoints": Check(
        INPUTS,
        "resuming from checkpoints with a missing or truncated file, or with a damaged DropBP state",
        "the last whole checkpoint is used, or exit status 2 and one line",
        commands.checkpoints,
        3,
        60,
    ),
    "cycles": Check(
        LEAKS,
        "enable, train, calibrate and remove, on one model and on a new one each time",
        "no more objects than before; the handle is freed; other models and classes are untouched",
        lambda count, folder: endurance.cycles(count),
        60,
        5000,
    ),
    "release": Check(
        LEAKS,
        "models that go out of scope while enabled",
        "model and handle are freed",
        lambda count, folder: endurance.models_are_released(count),
        15,
        1000,
    ),
    "threads": Check(
        LEAKS,
        "four threads, each enabling and training a model of its own",
        "masks and gradients are those of a single thread",
        lambda count, folder: endurance.threads(count),
        40,
        2000,
    ),
    "long-nested": Check(
        LONG,
        "one run, default masks",
        "figures below",
        lambda count, folder: endurance.long_run(count, "nested"),
        150,
        5000,
    ),
    "long-exact": Check(
        LONG,
        "one run, exact masks",
        "figures below",
        lambda count, folder: endurance.long_run(count, "exact"),
        150,
        5000,
    ),
}
