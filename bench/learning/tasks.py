"""Small fine-tuning tasks made from what ships with every CPython: a base that knows some Python, and other text.

The base is a small byte-level Llama (`dropbp.cli.embedded`), trained briefly on a part of the standard
library and kept in the user's cache. A task is a text of another kind, how far it is from the base's, and how it is
fine-tuned: all parameters or LoRA, one batch a step or several micro-batches. Splits, batches and validation windows
follow from the seed alone, so that all methods of a comparison see the same bytes in the same order.
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

from dropbp.cli.corpus import digest, english_prose
from dropbp.cli.embedded import Base, base_folder, cached_base, new_model
from dropbp.cli.models import with_lora
from dropbp.errors import ConfigError

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
# Packages of the standard library that the base never sees, and which the gentle shift is made of.
HELD_OUT = ("asyncio", "email", "tkinter", "unittest", "urllib", "xml", "xmlrpc", "wsgiref", "zoneinfo")
_NOT_TEXT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"})


@dataclass(frozen=True)
class Task:
    """A text to fine-tune on, and how.

    Attributes:
        name: as in tables.
        text: key of `TEXTS`.
        shift: how far the text is from the base's, in words.
        batch_size: windows per optimizer step, all micro-batches together.
        micro_batches: forwards per optimizer step; masks are drawn for each.
        lora_rank: rank of adapters on all linear layers of the blocks; 0 trains all parameters.
        learning_rates: each method is tried at all of them and reported at its best.
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
    """The task of that name. Raises ConfigError that lists the known ones."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; known are {', '.join(TASKS)}. Pass one of these.")
    return TASKS[name]


def split(task: Task) -> Split:
    """The task's text, its last tenth kept for validation: evenly spaced windows, the same for every run."""
    length = BASE.sequence_length
    text = TEXTS[task.text]()
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    border = int(len(data) * (1 - VALIDATION_SHARE))
    if border < 2 * length or len(data) - border < 2 * length:
        raise ConfigError(f"The text of task {task.name!r} has {len(data)} bytes only; it needs some {20 * length}.")
    held = data[border:]
    starts = torch.linspace(0, len(held) - length, VALIDATION_WINDOWS).long()
    return Split(data[:border], _windows(held, starts, length), digest(text))


def batches(split: Split, task: Task, seed: int, length: int | None = None) -> Iterator[list[Tensor]]:
    """Endless optimizer steps, each a list of micro-batches of windows at random places."""
    length = length or BASE.sequence_length
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(split.train) - length, (task.batch_size,), generator=generator)
        yield list(_windows(split.train, starts, length).chunk(task.micro_batches))


def _windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return torch.stack([data[start : start + length] for start in starts.tolist()])


def model_for(task: Task, seed: int, lora_rank: int | None = None) -> nn.Module:
    """A fresh copy of the trained base, in training mode, with adapters where the task (or `lora_rank`) asks."""
    model = base_model(BASE)
    rank = task.lora_rank if lora_rank is None else lora_rank
    if rank:
        model = with_lora(model, seed, r=rank, lora_alpha=2 * rank, lora_dropout=0.0)
    return model.train()  # type: ignore[no-any-return]


def base_model(base: Base, progress: Callable[[int, float], None] | None = None) -> Any:
    """The trained base from the cache; the first call trains it, in a few minutes on one core."""
    text = _base_text(base.corpus_bytes)
    folder = base_folder(base, f"bench-{digest(text)}")
    return cached_base(folder, lambda: _trained_base(base, text, progress or (lambda step, loss: None)))


def _trained_base(base: Base, text: str, progress: Callable[[int, float], None]) -> Any:
    model = new_model(base).train()
    optimizer = torch.optim.AdamW(model.parameters(), base.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, base.learning_rate, base.steps, pct_start=0.05)
    data = Split(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long(), torch.empty(0), "")
    recipe = dataclasses.replace(TASKS["python"], batch_size=base.batch_size)
    stream = batches(data, recipe, base.seed, base.sequence_length)
    for step in range(base.steps):
        (window,) = next(stream)
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, loss.item())
    return model


def _base_text(max_bytes: int) -> str:
    return _joined(python_files(lambda top: top not in HELD_OUT), max_bytes)


def _held_out_python() -> str:
    return _joined(python_files(lambda top: top in HELD_OUT), 2_000_000)


def _prose() -> str:
    return english_prose(1_000_000)


def _c_headers() -> str:
    return _joined(sorted(Path(sysconfig.get_path("include")).rglob("*.h")), 2_000_000)


TEXTS: dict[str, Callable[[], str]] = {"held_out_python": _held_out_python, "prose": _prose, "c_headers": _c_headers}


def python_files(wanted: Callable[[str], bool]) -> list[Path]:
    """Source files of the standard library, tests left out, whose top-level package or file name is wanted."""
    root = Path(sysconfig.get_path("stdlib"))
    places = (path.relative_to(root) for path in root.rglob("*.py"))
    found = sorted(place for place in places if _NOT_TEXT.isdisjoint(place.parts) and wanted(place.parts[0]))
    return [root / place for place in found]


def _joined(paths: list[Path], max_bytes: int) -> str:
    """Files in an order that is shuffled and always the same, so that every part of the text is of all kinds."""
    if not paths:
        raise ConfigError("A text of the bench is not on this machine: install a complete Python, headers included.")
    ordered = sorted(paths)
    random.Random(0).shuffle(ordered)
    text = "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in ordered)
    return text.encode()[:max_bytes].decode(errors="ignore")
