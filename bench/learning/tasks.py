"""Small fine-tuning tasks from data in every CPython installation: a base that knows some Python, and other text.

The base is a small byte-level Llama (`common.small`), trained briefly on a part of the standard library and kept in the
user's cache. A task defines a text of another kind, its distance from the base's text, and the fine-tuning: all
parameters or LoRA, one batch per step or several micro-batches. Splits, batches and validation windows depend on the
seed alone, so all methods of a comparison see the same bytes in the same order.
"""

from __future__ import annotations

import dataclasses
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dropbp.cli.models import with_lora
from dropbp.errors import ConfigError

from ..common.corpus import as_bytes, digest, english_prose, joined, python_files, read, windows
from ..common.presets import chosen
from ..common.small import Base, base_folder, cached_base, new_model, train_briefly

BASE = Base(
    layers=8,
    width=96,
    heads=4,
    sequence_length=64,
    batch_size=16,
    steps=900,
    learning_rate=3e-3,
    corpus_bytes=6_000_000,
)
VALIDATION_SHARE = 0.1
VALIDATION_WINDOWS = 64
# Packages of the standard library that the base never sees; they make up the gentle shift.
HELD_OUT = ("asyncio", "email", "tkinter", "unittest", "urllib", "xml", "xmlrpc", "wsgiref", "zoneinfo")


@dataclass(frozen=True)
class Task:
    """A text to fine-tune on, and the settings.

    Attributes:
        name: name in tables.
        text: key of `TEXTS`.
        shift: distance of the text from the base's, in words.
        batch_size: windows per optimizer step, over all micro-batches.
        micro_batches: forwards per optimizer step; each has masks of its own.
        lora_rank: rank of adapters on all linear layers of the blocks; 0 trains all parameters.
        learning_rates: all of them are tried for each method, and the best is reported.
    """

    name: str
    text: str
    shift: str
    batch_size: int = 8
    micro_batches: int = 1
    lora_rank: int = 0
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)


TASKS = {
    task.name: task
    for task in (
        Task("python", "held_out_python", "gentle: other packages of the same library", learning_rates=(2e-4, 6e-4)),
        Task("prose", "prose", "hard: from Python to English"),
        Task(
            "c-accumulated",
            "c_headers",
            "hard: from Python to C, two micro-batches accumulated",
            micro_batches=2,
            learning_rates=(7e-4, 1.5e-3),
        ),
        Task("c-long", "c_headers", "hard: from Python to C, five times as long", learning_rates=(5e-4, 1e-3)),
        Task("prose-lora", "prose", "hard: from Python to English, LoRA", lora_rank=8, learning_rates=(3e-3, 1e-2)),
    )
}


@dataclass(frozen=True)
class Split:
    """Bytes to train on and fixed windows to validate on, shape (windows, sequence_length)."""

    train: Tensor
    validation: Tensor
    digest: str


def task(name: str) -> Task:
    """The task with that name. Raises ConfigError that lists the known ones."""
    return chosen("task", TASKS, name)


def split(task: Task) -> Split:
    """The task's text, with its last tenth held out for validation in evenly spaced windows, the same for every run."""
    length = BASE.sequence_length
    text = TEXTS[task.text]()
    data = as_bytes(text)
    border = int(len(data) * (1 - VALIDATION_SHARE))
    if border < 2 * length or len(data) - border < 2 * length:
        raise ConfigError(f"The text of task {task.name!r} has {len(data)} bytes only; it needs some {20 * length}.")
    held = data[border:]
    starts = torch.linspace(0, len(held) - length, VALIDATION_WINDOWS).long()
    return Split(data[:border], windows(held, starts, length), digest(text))


def batches(split: Split, task: Task, seed: int, length: int | None = None) -> Iterator[list[Tensor]]:
    """Yield optimizer steps without end, each a list of micro-batches of windows at random positions."""
    length = length or BASE.sequence_length
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(split.train) - length, (task.batch_size,), generator=generator)
        yield list(windows(split.train, starts, length).chunk(task.micro_batches))


def model_for(task: Task, seed: int, lora_rank: int | None = None) -> nn.Module:
    """A fresh copy of the trained base, in training mode, with adapters if the task (or `lora_rank`) wants them."""
    model = base_model(BASE)
    rank = task.lora_rank if lora_rank is None else lora_rank
    if rank:
        model = with_lora(model, seed, r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    return model.train()  # type: ignore[no-any-return]


def base_model(base: Base) -> Any:
    """The trained base from the cache. The first call trains it, which takes a few minutes on one core."""
    text = _joined(python_files(lambda top: top not in HELD_OUT), base.corpus_bytes)
    return cached_base(base_folder(base, f"bench-{digest(text)}"), lambda: _trained_base(base, text))


def _trained_base(base: Base, text: str) -> Any:
    model = new_model(base)
    whole = dataclasses.replace(TASKS["python"], batch_size=base.batch_size)
    stream = batches(Split(as_bytes(text), torch.empty(0), ""), whole, base.seed, base.sequence_length)
    options: dict[str, Any] = {"betas": (0.9, 0.95), "warmup_share": 0.05}
    train_briefly(model, lambda: next(stream)[0], base.steps, base.learning_rate, **options)
    return model


def _held_out_python() -> str:
    return _joined(python_files(lambda top: top in HELD_OUT), 2_000_000)


def _prose() -> str:
    return english_prose(1_000_000)


def _c_headers() -> str:
    return _joined(sorted(Path(sysconfig.get_path("include")).rglob("*.h")), 2_000_000)


TEXTS: dict[str, Callable[[], str]] = {"held_out_python": _held_out_python, "prose": _prose, "c_headers": _c_headers}


def _joined(paths: list[Path], max_bytes: int) -> str:
    """Files in a fixed shuffled order, so every part of the text contains all kinds."""
    ordered = sorted(paths)
    random.Random(0).shuffle(ordered)
    return joined(map(read, ordered), max_bytes, "a text of the bench: the standard library or Python's C headers")
