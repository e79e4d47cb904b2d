"""`dropbp bench gpu`: the most valuable measurements on a borrowed GPU first, a few minutes at a time.

The plan is a list of items; each is one run of another part of the bench. The command does as many as its minutes
allow. Runs write each figure as soon as it is measured, and `gpu.json` in the same folder says which items are done.
The next call continues there, whatever ended the last one, even in the middle of an item. Nothing is downloaded; models
have random weights and are created on the device.

Counted memory: Llama-2-7B in full fine-tuning takes 50.7 GiB with the states of AdamW in bf16, as here, and LoRA 21.4;
70B under QLoRA 58.3 at 1 x 512 and 36.7 checkpointed. At the paper's 2 x 512 it is 81.7, too much for a card of 80 GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dropbp.device import get_device
from dropbp.errors import ConfigError

from ..common import records
from ..common.models import KERNELS
from ..common.options import device_name, say
from ..common.presets import MODELS, SEQLEN, THROUGHPUT, ThroughputPreset, Training
from ..common.processes import Worker, stoppable
from ..common.setup import SAMPLERS
from ..report import paper
from .invariants import PRESETS as INVARIANTS

LEDGER = "gpu.json"
MINUTES = 10.0
TRIES = 2  # for a failing item
HELD_BYTES = 1 << 26  # if an item leaves more behind, the next one starts in a new process
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
PARTS = {
    "a": "Llama-2-7B, full and LoRA: what a step promises, its time, its memory",
    "b": "the longest sequence, the largest micro-batch, compiled steps",
    "c": "70B QLoRA; Liger's kernels and flash attention",
}
# For the estimate alone; an item that was run has its own time. Operations per second that training reaches on a card
# of the H100's class, and seconds for a process and a model.
OPERATIONS_PER_S = {"cuda": 3e14, "cpu": 2e10}
START_S = {"cuda": 25.0, "cpu": 4.0}
TRIED_SIZES, TRIED_TOKENS = 8, 20_000


@dataclass(frozen=True)
class Item:
    """One run: a part of the plan, the arguments of `dropbp bench`, and what affects its scheduling.

    Attributes:
        steps_tokens: tokens trained on in all its steps together.
        package: package that must be installed for it.
        alone: whether it needs the whole device, so that it starts in a process of its own.
    """

    part: str
    command: tuple[str, ...]
    model: str
    steps_tokens: float
    package: str | None = None
    alone: bool = False

    @property
    def name(self) -> str:
        """The name in lists."""
        return " ".join(word for word in self.command if word not in ("--preset", "--only"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, __doc__
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where figures go; a stopped run continues there"
    )
    parser.add_argument("--minutes", type=float, help=f"how much of the plan is done now ({MINUTES:g}; all: inf)")
    parser.add_argument("--device", default="cuda", help="%(default)s; on cpu only the rehearsal, --smoke")
    parser.add_argument("--smoke", action="store_true", help="rehearse the whole plan with tiny models")
    parser.add_argument("--plan", action="store_true", help="print plan and estimate, and measure nothing")
    parser.add_argument("--again", action="store_true", help="forget what is done")


def run(args: argparse.Namespace) -> int:
    """Do some minutes of the plan. Returns 0 if nothing is left, 1 if items failed, else 3: call again.

    Raises:
        KeyboardInterrupt: SIGINT or SIGTERM arrived; the next call continues.
    """
    minutes = MINUTES if args.minutes is None else args.minutes
    if not minutes > 0:
        raise ConfigError(f"--minutes {minutes:g} must be above 0.")
    kind = device_name(args)
    if kind == "cpu" and not args.smoke:
        raise ConfigError("the plan needs a GPU; on a CPU it can be rehearsed with tiny models: --smoke.")
    get_device(args.device)
    items, ledger = plan(args.smoke), Ledger(args.output, args.again)
    say(estimate(items, ledger, kind))
    if args.plan:
        return 0
    left = Work(items, ledger, args).until(time.monotonic() + 60 * minutes)
    failed = [item for item in items if ledger.status(item) == "failed"]
    say(summary(args.output, items, ledger))
    return 3 if left else 1 if failed else 0


# -- the plan


def plan(smoke: bool) -> list[Item]:
    """All items, the most valuable first."""
    preset = (lambda name: "rehearsal") if smoke else (lambda name: name)
    step_items = [Training(tuning, checkpointing=again) for again in (False, True) for tuning in ("full", "lora")]
    items = [_steps("a", preset("llama2-7b"), training) for training in step_items]
    eager = [_invariants(preset("llama2-7b"), Training(tuning)) for tuning in ("full", "lora")]
    compiled = [
        _invariants(preset("llama2-7b-4-layers"), Training(tuning, compiled=True)) for tuning in ("full", "lora")
    ]
    items = [*items[:2], *eager, *items[2:], *compiled]
    items += [_longest("b", preset("llama2-7b"), Training(tuning)) for tuning in ("full", "lora")]
    items += [_growth(preset("llama2-7b"), Training(tuning)) for tuning in ("full", "lora")]
    items += [_steps("b", preset("llama2-7b"), Training(tuning, compiled=True)) for tuning in ("full", "lora")]
    items += [_longest("b", preset("llama2-7b"), Training("full", loss="chunked"))]
    big = preset("llama2-70b-qlora-1x512")
    items += [_steps("c", big, Training("qlora", checkpointing=again), "bitsandbytes") for again in (False, True)]
    items += [_longest("c", preset("llama2-70b-qlora"), Training("qlora"), "bitsandbytes")]
    for kernels, package in KERNELS.items():
        items.append(_steps("c", preset("llama2-7b-kernels"), Training("full", kernels=kernels), package))
    return items


def _steps(part: str, preset: str, training: Training, package: str | None = None) -> Item:
    chosen = THROUGHPUT[preset]
    variants = 3 + (len(SAMPLERS) + (not training.compiled)) * len(chosen.drop_rates)  # plain, split, unrecorded
    tokens = (chosen.rounds + chosen.warmup_rounds + 2) * variants * chosen.batch_size * chosen.sequence_length
    command = ("throughput", "--preset", preset, "--only", training.name, "--no-growth")
    return Item(part, command, chosen.model, tokens, package, alone=package is not None)


def _growth(preset: str, training: Training) -> Item:
    chosen: ThroughputPreset = THROUGHPUT[preset]
    variants = 1 + len(SAMPLERS) * len(chosen.drop_rates)
    tokens = variants * (TRIED_SIZES + chosen.growth_rounds) * _tried_tokens(preset)
    command = ("throughput", "--preset", preset, "--only", training.name, "--growth-only")
    return Item("b", command, chosen.model, tokens, alone=True)


def _longest(part: str, preset: str, training: Training, package: str | None = None) -> Item:
    chosen = SEQLEN[preset]
    command = ("seqlen", "--preset", preset, "--only", training.name, "--drop-rates", "0.875", "--masks", "exact")
    return Item(part, command, chosen.model, 2 * TRIED_SIZES * 3 * _tried_tokens(preset), package, alone=True)


def _tried_tokens(preset: str) -> int:
    return 32 if preset == "rehearsal" else TRIED_TOKENS


def _invariants(preset: str, training: Training) -> Item:
    chosen = INVARIANTS[preset]
    variants = len(SAMPLERS) * len(chosen.drop_rates)
    tokens = (chosen.masks if training.compiled else 12) * variants * chosen.batch_size * chosen.sequence_length
    return Item("a", ("invariants", "--preset", preset, "--only", training.name), chosen.model, tokens)


def estimate_s(item: Item, kind: str) -> float:
    """Estimated seconds of an item on a card of the H100's class: 6 operations per parameter and token."""
    shape = MODELS[item.model]
    attention = 2 * shape.width * (shape.width + shape.width * shape.kv_heads // shape.heads)
    per_layer = attention + 3 * shape.width * shape.intermediate
    parameters = shape.layers * per_layer + 2 * shape.width * shape.vocabulary
    known = kind if kind in OPERATIONS_PER_S else "cuda"
    return START_S[known] + 6 * parameters * item.steps_tokens / OPERATIONS_PER_S[known]


def missing(item: Item) -> str | None:
    """The package that an item needs and that is not installed; None if there is none."""
    absent = item.package is not None and importlib.util.find_spec(item.package) is None
    return item.package if absent else None


# -- progress


class Ledger:
    """Which items are done, their time and outcome, in one file that is rewritten after each change."""

    def __init__(self, folder: Path, again: bool = False) -> None:
        self.path = folder / LEDGER
        self.entries: dict[str, dict[str, Any]] = {}
        if self.path.is_file() and not again:
            self.entries = records.read(self.path)["items"]

    def status(self, item: Item) -> str:
        """`finished`, `failed`, `begun` (also if it was stopped), or `open`."""
        return str(self.entries.get(item.name, {}).get("status", "open"))

    def tries(self, item: Item) -> int:
        """How often the item was begun and failed."""
        return int(self.entries.get(item.name, {}).get("failures", 0))

    def seconds(self, item: Item) -> float:
        """Seconds spent on the item."""
        return float(self.entries.get(item.name, {}).get("seconds", 0.0))

    def reason(self, item: Item) -> str:
        """Why the item failed."""
        return str(self.entries.get(item.name, {}).get("reason") or "")

    def note(self, item: Item, status: str, seconds: float = 0.0, reason: str | None = None) -> None:
        """Record the item's status."""
        entry = self.entries.setdefault(item.name, {"command": list(item.command), "seconds": 0.0, "failures": 0})
        entry.update(status=status, reason=reason, seconds=round(entry["seconds"] + seconds, 1))
        entry["failures"] += status == "failed"
        content = {"schema": records.SCHEMA, "kind": "gpu", "written": records.now(), "items": self.entries}
        records.write(content | {"versions": records.versions()}, self.path)


def to_do(items: Iterable[Item], ledger: Ledger) -> list[Item]:
    """The remaining items in the order of the plan; failed ones come last, and at most twice."""
    able = [item for item in items if missing(item) is None and ledger.status(item) != "finished"]
    fresh = [item for item in able if ledger.status(item) != "failed"]
    return [*fresh, *(item for item in able if ledger.status(item) == "failed" and ledger.tries(item) < TRIES)]


class Work:
    """Does items in a worker process that is kept as long as it stays clean."""

    def __init__(self, items: Sequence[Item], ledger: Ledger, args: argparse.Namespace) -> None:
        self.items, self.ledger = items, ledger
        self.options = ["--device", args.device, "--output", str(args.output)]
        self.on_device = device_name(args) != "cpu"
        self.worker: Worker | None = None

    def until(self, until_s: float) -> list[Item]:
        """Do remaining items until then; return those that are left."""
        with stoppable() as stop:
            try:
                for item in to_do(self.items, self.ledger):
                    if time.monotonic() >= until_s or stop():
                        break
                    say(f"-- ({item.part}) {item.name}")
                    self._do(item, until_s, stop)
            finally:
                self._end_worker()
            if stop():
                raise KeyboardInterrupt("stopped; the same command continues")
        return to_do(self.items, self.ledger)

    def _do(self, item: Item, until_s: float, stop: Callable[[], bool]) -> None:
        if item.alone and self.on_device:
            self._end_worker()
        if self.worker is None:
            self.worker = Worker("dropbp.bench.worker", ENVIRONMENT)
        began_s = time.monotonic()
        self.ledger.note(item, "begun")
        self.worker.ask([*item.command, *self.options, *self._limit(item)])
        try:
            answer = next(self.worker.answers(until_s, stop))
        except (TimeoutError, KeyboardInterrupt):
            self._end_worker()
            self.ledger.note(item, "begun", time.monotonic() - began_s)
            return
        status, reason = "finished", None
        if answer is None:
            status, reason = "failed", "its process died"
        elif answer["status"] != 0:
            status, reason = "failed", answer["error"] or "its record says why"
        self.ledger.note(item, status, time.monotonic() - began_s, reason)
        if answer is None or (item.alone and self.on_device) or answer["held_bytes"] > HELD_BYTES:
            self._end_worker()

    @staticmethod
    def _limit(item: Item) -> list[str]:
        """Set no time limit, so that the run does not end by itself with half of its figures: it is stopped and
        continued.
        """
        return [] if item.command[0] == "invariants" else ["--minutes", "inf"]

    def _end_worker(self) -> None:
        if self.worker is not None:
            self.worker.end()
            self.worker = None


# -- messages


def estimate(items: Sequence[Item], ledger: Ledger, kind: str) -> str:
    """The plan, with minutes for each remaining item and for each part."""
    lines = ["The plan; minutes are estimates for a card of the H100's class." if kind != "cpu" else "A rehearsal."]
    for part, title in PARTS.items():
        members = [item for item in items if item.part == part]
        left = [item for item in members if missing(item) is None and ledger.status(item) not in ("finished", "failed")]
        lines.append(f"({part}) {title}: {_minutes(sum(_left_s(item, ledger, kind) for item in left))}")
        lines += [f"    {_state(item, ledger, kind):<12} {item.name}" for item in members]
    return "\n".join(lines)


def _state(item: Item, ledger: Ledger, kind: str) -> str:
    if missing(item) is not None:
        return f"no {missing(item)}"
    status = ledger.status(item)
    return status if status in ("finished", "failed") else _minutes(_left_s(item, ledger, kind))


def _left_s(item: Item, ledger: Ledger, kind: str) -> float:
    start_s = START_S.get(kind, START_S["cuda"])
    return max(estimate_s(item, kind) - ledger.seconds(item), start_s)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def summary(folder: Path, items: Sequence[Item], ledger: Ledger) -> str:
    """The status of each item, and the published figures beside those measured."""
    lines = []
    for item in items:
        absent = missing(item)
        state = f"skipped: {absent} is not installed" if absent else ledger.status(item)
        reason = f": {ledger.reason(item)}" if ledger.reason(item) else ""
        lines.append(f"{state:<10} {_minutes(ledger.seconds(item))}  {item.name}{reason}")
    return "\n".join([*lines, "", paper.table(paper.compare(folder))])
