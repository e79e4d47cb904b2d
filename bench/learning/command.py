"""Validation loss of every method at equal FLOPs, time and memory, each at its best learning rate.

`dropbp bench learning --preset full --resume` measures step times, trains, and writes one JSON file per run. `--tables`
makes the tables and the plot from those files alone (`tables`).

All methods start from the same model and see the same batches in the same order. The learning rate is constant after a
short warm-up, so a truncated run equals a shorter run, and one run serves every comparison: its validation curve is
read where it has used as many FLOPs, or as much time, as plain training. Time is the number of steps times the ratio of
the method's mean step time to that of plain training. Both are measured interleaved in one process, so a busy machine
slows them alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import dropbp
from dropbp.device import get_device
from dropbp.memory import saved_tensor_bytes

from ..common import records
from ..common.records import Record, read_folder
from . import rivals, tables, tasks
from .costs import Costs
from .curves import (
    CURVE_POINTS,
    MEMORY_BUDGET,
    MEMORY_TO_SPARE,
    SHORT_OF_MEMORY,
    Variant,
    equal_time_loss,
    memory_share,
    of_kind,
    retimed,
    short_of_memory,
    step_ratio,
)
from .presets import (
    FRESH,
    PRESETS,
    Preset,
    Run,
    chosen_tasks,
    first_runs,
    further_runs,
    variants,
    wider_runs,
)

logger = logging.getLogger(__name__)

RESULTS = records.RESULTS / "learning"
WARMUP_STEPS = 8
WARMUP_ROUNDS = 2  # of timing
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
RIVAL_LORA_RANK = 8


# -- one training step


class Trainer:
    """A task's model under a method, with AdamW; runs one optimizer step at a time on given batches."""

    def __init__(self, run: Run, steps: int | None = None, checkpointing: bool = False) -> None:
        task = tasks.task(run.task)
        self.model = tasks.model_for(task, run.seed, lora_rank=RIVAL_LORA_RANK if run.method == "lora" else None)
        if checkpointing:
            cast(Any, self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        size = task.batch_size // task.micro_batches
        self.costs = plain = Costs.counted(self.model, _blank(size))
        if run.method == "lora":  # compared with full fine-tuning
            plain = Costs.counted(tasks.model_for(task, run.seed), _blank(size))
        self.plain_step_flops = plain.of(rivals.Work()) * task.micro_batches
        self.method = rivals.method(run.method, self.model, run.drop_rate, run.seed, steps or run.plain_steps)
        groups = self.method.groups(run.learning_rate)
        self.optimizer = torch.optim.AdamW(groups, run.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warmup)
        self.steps = 0
        self.flops = 0.0

    def step(self, micro_batches: Sequence[Tensor]) -> float:
        """Run one optimizer step; returns the mean loss of its micro-batches."""
        self.method.begin_step(self.steps)
        loss = sum(self._micro_batch(window, len(micro_batches)) for window in micro_batches)
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.steps += 1
        return loss

    def _micro_batch(self, window: Tensor, count: int) -> float:
        with self.method.micro_batch():
            loss = self.loss(window) / count
            if loss.requires_grad:  # with adapters, nothing is left to train if all blocks are skipped
                loss.backward()
        self.flops += self.costs.of(self.method.work())
        return float(loss.detach())

    def loss(self, windows: Tensor) -> Tensor:
        """Loss per byte of one forward."""
        found: Tensor = self.model(input_ids=windows, labels=windows).loss
        return found

    @torch.no_grad()
    def validate(self, windows: Tensor) -> float:
        """Mean loss per byte on the validation windows."""
        self.model.eval()
        loss = float(self.loss(windows))
        self.model.train()
        return loss


def _blank(batch_size: int) -> dict[str, Tensor]:
    window = torch.zeros(batch_size, tasks.BASE.sequence_length, dtype=torch.long)
    return {"input_ids": window, "labels": window}


def _warmup(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS)


# -- runs and their files


def train(run: Run, step_ratio: float, progress: Callable[[int], None] = lambda step: None) -> Record:
    """Train and return the record: losses, raw step times, validation curve by step, FLOPs and relative time.

    The run lasts as many steps as plain training, or until it has used as many FLOPs, whichever is later.
    """
    task = tasks.task(run.task)
    split = tasks.split(task)
    stream = tasks.batches(split, task, run.seed)
    record: Record = {**_header("run", run), "losses": [], "step_s": [], "evaluations": [], "status": "cancelled"}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            _train(
                Trainer(run, math.ceil(run.plain_steps / step_ratio)),
                run,
                step_ratio,
                stream,
                split.validation,
                record,
                progress,
            )
        record["status"] = "finished"
    except (RuntimeError, ValueError, dropbp.DropBPError) as error:
        logger.warning("%s failed: %s", run.name, error)
        record |= {"status": "failed", "error": traceback.format_exc(limit=-3)}
    except KeyboardInterrupt:
        logger.warning("%s was cancelled", run.name)
    return record | {"finished": records.now()}


def _train(
    trainer: Trainer,
    run: Run,
    step_ratio: float,
    stream: Iterator[list[Tensor]],
    windows: Tensor,
    record: Record,
    progress: Callable[[int], None],
) -> None:
    budget = trainer.plain_step_flops * run.plain_steps
    equal_time = run.plain_steps / step_ratio
    every = equal_time / CURVE_POINTS
    record |= {"step_ratio": step_ratio, "flops_budget": budget, "equal_time_steps": equal_time}
    while trainer.steps < equal_time or trainer.flops < budget:
        started = time.perf_counter()
        record["losses"].append(round(trainer.step(next(stream)), 4))
        record["step_s"].append(round(time.perf_counter() - started, 4))
        done = trainer.steps
        last = done >= equal_time and trainer.flops >= budget
        if last or math.floor(done / every) > math.floor((done - 1) / every):
            record["evaluations"].append(_evaluation(trainer, windows, step_ratio))
        progress(done)
    trainer.method.remove()


def _evaluation(trainer: Trainer, windows: Tensor, step_ratio: float) -> Record:
    loss = round(trainer.validate(windows), 5)
    return {"step": trainer.steps, "time": trainer.steps * step_ratio, "flops": trainer.flops, "loss": loss}


def step_times(task_name: str, variants: Sequence[Variant], rounds: int) -> Record:
    """Interleaved step times of (method, drop rate, checkpointing), and the bytes that each variant keeps.

    Ratios are means of processor time relative to plain training. On one thread this is the time a step would take on
    an idle core, unaffected by other processes. Wall times are kept as well.
    """
    task = tasks.task(task_name)
    stream = tasks.batches(tasks.split(task), task, 0)
    record = _header(MEMORY_TO_SPARE, Run(task_name, "all", 0.0, 1e-5, 0, rounds))
    trainers = [
        Trainer(Run(task_name, name, rate, 1e-5, 0, rounds), rounds + 2 * WARMUP_ROUNDS, ckpt)  # the middle is timed
        for name, rate, ckpt in variants
    ]
    rows: list[Record] = [
        {"method": name, "drop_rate": rate, "checkpointing": ckpt, "cpu_s": [], "wall_s": [], "saved_mib": []}
        for name, rate, ckpt in variants
    ]
    for done in range(-WARMUP_ROUNDS, rounds):
        window = next(stream)
        for trainer, row in zip(trainers, rows, strict=True):
            cpu_s, wall_s = _timed(trainer, window)
            if done >= 0:
                row["cpu_s"].append(round(cpu_s, 5))
                row["wall_s"].append(round(wall_s, 5))
    for trainer, row in zip(trainers, rows, strict=True):
        row["saved_mib"] = [round(_saved_mib(trainer, next(stream)), 3) for _ in range(4)]
    return record | {"rows": rows, "status": "finished", "finished": records.now()}


def _timed(trainer: Trainer, window: Sequence[Tensor]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.step(window)
    return time.process_time() - cpu, time.perf_counter() - wall


def _saved_mib(trainer: Trainer, window: Sequence[Tensor]) -> float:
    """MiB of the tensors that autograd keeps from forward to backward, without parameters; each storage counts once."""
    with trainer.method.deepest():
        return saved_tensor_bytes(lambda: trainer.loss(window[0]), exclude=[trainer.model]) / 2**20


def _header(kind: str, run: Run) -> Record:
    device = {**get_device("cpu").describe(), "threads": torch.get_num_threads()}
    settings = {"warmup_steps": WARMUP_STEPS, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
    config = {**asdict(run), "optimizer": "AdamW", **settings, "base": asdict(tasks.BASE)}
    config["task_settings"] = asdict(tasks.task(run.task))
    return {
        "schema": records.SCHEMA,
        "kind": kind,
        "config": config,
        "versions": records.versions(),
        "device": device,
        "started": records.now(),
    }


# -- the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick", help="which runs (default: %(default)s)")
    parser.add_argument("--task", action="append", help="only this task of the preset; may be repeated")
    parser.add_argument("--resume", action="store_true", help="skip runs that are finished already")
    parser.add_argument("--tables", action="store_true", help="train nothing; make tables and plot from the files")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where tables go (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run a preset, and make the tables from the files."""
    torch.set_num_threads(args.threads)
    if not args.tables:
        _quiet_libraries()
        preset = PRESETS[args.preset]
        run_preset(dataclasses.replace(preset, tasks=chosen_tasks(preset, args.task)), args.output, args.resume)
    tables.write(read_folder(args.output), args.docs, fresh=read_folder(args.output / FRESH))
    return 0


def _quiet_libraries() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def run_preset(preset: Preset, folder: Path, resume: bool) -> None:
    """Measure step times, then do all runs. Each run is written as soon as it ends, also by an error."""
    ratios = {name: _measured_times(preset, name, folder, resume) for name in preset.tasks}
    own = folder / preset.folder
    _run_all(first_runs(preset), ratios, own, resume)
    while wider := wider_runs(preset, read_folder(own)):
        _run_all(wider, ratios, own, resume)
    _run_all(further_runs(preset, read_folder(own)), ratios, own, resume)


def _measured_times(preset: Preset, task_name: str, folder: Path, resume: bool) -> list[Record]:
    """Step times with memory to spare. Those short of memory are measured as well, for the tables."""
    known = [*variants(preset, tasks.task(task_name)), *preset.once]
    rounds = preset.timing_rounds
    spare: list[Variant] = [(*which, False) for which in known if which[0] != "plain"]
    times = _measured(task_name, MEMORY_TO_SPARE, spare, rounds, folder, resume)
    short = [short_of_memory(name, rate) for name, rate in known if memory_share(times, name, rate) > MEMORY_BUDGET]
    _measured(task_name, SHORT_OF_MEMORY, short, rounds, folder, resume)
    return times


def _measured(
    task_name: str, kind: str, wanted: Sequence[Variant], rounds: int, folder: Path, resume: bool
) -> list[Record]:
    """All step times of a kind. Missing ones are measured along with plain training and written to a new file."""
    known = of_kind(read_folder(folder), kind, task_name) if resume else []
    rows = {(row["method"], row["drop_rate"], row["checkpointing"]) for record in known for row in record["rows"]}
    missing = [variant for variant in wanted if variant not in rows]
    if not missing:
        return known
    record = step_times(task_name, [("plain", 0.0, False), *missing], rounds) | {"kind": kind}
    number = f"-{len(known) + 1}" if known else ""
    records.write(record, folder / f"{task_name}--{kind.replace(' ', '-')}{number}.json", compact=True)
    return [*known, record]


def _run_all(runs: Sequence[Run], times: dict[str, list[Record]], folder: Path, resume: bool) -> None:
    from tqdm import tqdm

    bar = tqdm(runs, desc="runs", disable=not sys.stderr.isatty())
    for run in bar:
        path = folder / f"{run.name}.json"
        ratio = step_ratio(times[run.task], run.method, run.drop_rate)
        if resume and _is_finished(path, ratio):
            continue
        bar.set_postfix_str(run.name)
        record = train(run, ratio)
        records.write(record, path, compact=True)
        if record["status"] == "cancelled":
            raise KeyboardInterrupt(f"cancelled in {run.name}; --resume continues from here")


def _is_finished(path: Path, ratio: float) -> bool:
    """Whether the run finished and, by the current step times, lasted at least as long as plain training."""
    record = records.read(path) if path.is_file() else {"status": "missing"}
    return record["status"] == "finished" and math.isfinite(equal_time_loss(retimed(record, ratio)))
