"""Does it learn? Validation loss of every method at equal FLOPs, equal time and equal memory, each at its best rate.

`python -m bench.learning --preset full --resume` measures step times, trains, and writes one JSON file per run;
`--tables` makes the tables and the plot from those files alone (`learning_tables`).

All methods start from the same model and see the same batches in the same order. The learning rate is constant after
a short warm-up, so that a run cut short is a shorter run, and one run serves every comparison: its validation curve is
read where it has used as many FLOPs, or as much time, as plain training. Time is steps times the method's mean step
time over plain training's, both measured in turns in one process, so that a busy machine slows them alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dropbp
from dropbp.device import get_device
from dropbp.errors import ConfigError
from dropbp.integrations.files import write_text

from . import rivals, tasks

logger = logging.getLogger(__name__)

SCHEMA = 1
RESULTS = Path(__file__).parent / "results" / "learning"
WARMUP_STEPS = 8
WARMUP_ROUNDS = 2  # of timing
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
CURVE_POINTS = 6
RIVAL_LORA_RANK = 8
_PACKAGES = ("dropbp", "torch", "transformers", "peft")
Record = dict[str, Any]
Variant = tuple[str, float, bool]  # method, drop rate, gradient checkpointing
MEMORY_TO_SPARE, SHORT_OF_MEMORY = "step times", "step times short of memory"
CAPPED = "capped"


@dataclass(frozen=True)
class Run:
    """One training: what is trained, how, and for how long in terms of plain steps."""

    task: str
    method: str
    drop_rate: float
    learning_rate: float
    seed: int
    plain_steps: int

    @property
    def name(self) -> str:
        """Name of its file, without the ending."""
        method = self.method.replace(" ", "-").replace("+", "-and-").replace(":", "-")
        return f"{self.task}--{method}--p{self.drop_rate:g}--lr{self.learning_rate:g}--seed{self.seed}"


@dataclass(frozen=True)
class Preset:
    """A set of runs: plain training and each method at each drop rate, first with one seed at every learning rate,
    then with the other seeds at the best; and those of `once`, (method, drop rate), with the first seed only. Its
    files lie in `folder` below that of all results.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    drop_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    plain_steps: int
    timing_rounds: int
    once: tuple[tuple[str, float], ...] = ()
    folder: str = ""


FRESH = "fresh"
PRESETS = {
    "quick": Preset(("prose-lora",), ("published", "freezing", "default"), (0.5,), (0,), 16, 4),
    "long": Preset(
        tasks=("c-long",),
        methods=("freezing", "published", "nested shelf", "default"),
        drop_rates=(0.5, 0.875),
        seeds=(0,),
        plain_steps=320,
        timing_rounds=32,
    ),
    "full": Preset(
        tasks=("python", "c-accumulated", "prose-lora"),
        methods=("freezing", "published", "nested shelf", "default", "independent", "exact", "cyclic", "pool"),
        drop_rates=(0.5, 0.75, 0.875),
        seeds=(0, 1, 2),
        plain_steps=64,
        timing_rounds=96,
        once=(
            ("nested geometric", 0.5),
            ("nested geometric", 0.875),
            ("nested shelf slow-deep", 0.5),
            ("nested shelf slow-deep", 0.875),
            ("lora", 0.0),
            ("lisa", 0.5),
            ("layerdrop", 0.5),
            ("pld", 0.0),
        ),
    ),
    # What the default was not chosen on: other seeds, and a text of which no run had been made.
    FRESH: Preset(
        tasks=("python", "c-accumulated", "prose-lora", "prose"),
        methods=("freezing", "published", "default"),
        drop_rates=(0.5, 0.75, 0.875),
        seeds=(3, 4, 5),
        plain_steps=64,
        timing_rounds=96,
        folder=FRESH,
    ),
}


# -- one training step


class Trainer:
    """A task's model under a method with AdamW: one optimizer step at a time, on the batches it is given."""

    def __init__(self, run: Run, steps: int | None = None, checkpointing: bool = False) -> None:
        task = tasks.task(run.task)
        self.model = tasks.model_for(task, run.seed, lora_rank=RIVAL_LORA_RANK if run.method == "lora" else None)
        if checkpointing:
            cast(Any, self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.costs = Costs.counted(self.model, task.batch_size // task.micro_batches)
        self.method = rivals.method(run.method, self.model, run.drop_rate, run.seed, steps or run.plain_steps)
        groups = self.method.groups(run.learning_rate)
        self.optimizer = torch.optim.AdamW(groups, run.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _warmup)
        self.steps = 0
        self.flops = 0.0

    def step(self, micro_batches: Sequence[Tensor]) -> float:
        """One optimizer step; the mean loss of its micro-batches."""
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
            loss = self.model(input_ids=window, labels=window).loss / count
            loss.backward()
        self.flops += self.costs.of(self.method.work())
        return float(loss.detach())

    @torch.no_grad()
    def validate(self, windows: Tensor) -> float:
        """Mean loss per byte of the validation windows."""
        self.model.eval()
        loss = float(self.model(input_ids=windows, labels=windows).loss)
        self.model.train()
        return loss


def _warmup(step: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS)


@dataclass(frozen=True)
class Costs:
    """FLOPs of one micro-batch: what always runs, and what each pass over the blocks costs in full."""

    rest: float
    forward: float
    activations: float
    weights: float

    def of(self, work: rivals.Work) -> float:
        """FLOPs of a micro-batch that did this share of the blocks' work."""
        return (
            self.rest + self.forward * work.forward + self.activations * work.activations + self.weights * work.weights
        )

    @classmethod
    def counted(cls, model: nn.Module, batch_size: int) -> Costs:
        """Counted from one forward and backward of the model as it is; nothing stays on it.

        What the blocks' backward costs beyond the gradients of activations is that of weights; activations' gradients
        cost as much as the forward does.
        """
        window = torch.zeros(batch_size, tasks.BASE.sequence_length, dtype=torch.long)
        blocks = float(sum(b.flops for b in dropbp.discover(model, {"input_ids": window, "labels": window})))
        head_trained = any(p.requires_grad for n, p in model.named_parameters() if "lm_head" in n)
        # The fused attention of CPUs is not known to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = model(input_ids=window, labels=window).loss
            forward = float(counter.get_total_flops())
            loss.backward()
            total = float(counter.get_total_flops())
        model.zero_grad()
        rest = (forward - blocks) * (3 if head_trained else 2)
        return cls(rest, blocks, blocks, total - rest - 2 * blocks)


# -- runs and their files


def train(run: Run, step_ratio: float, progress: Callable[[int], None] = lambda step: None) -> Record:
    """Train and return the record: losses, raw step times, validation curve by step, FLOPs and relative time.

    The run lasts as long as plain training does, or until it has used as many FLOPs, whichever is later.
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
    return record | {"finished": _now()}


def _train(
    trainer: Trainer,
    run: Run,
    step_ratio: float,
    stream: Iterator[list[Tensor]],
    windows: Tensor,
    record: Record,
    progress: Callable[[int], None],
) -> None:
    micro_batches = tasks.task(run.task).micro_batches
    budget = trainer.costs.of(rivals.Work()) * micro_batches * run.plain_steps
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


def step_times(task_name: str, variants: Sequence[Variant], rounds: int, seed: int = 0) -> Record:
    """Step times of (method, drop rate, checkpointing), one step of each in turn, and the bytes that each one keeps.

    Ratios are means of processor time over that of plain training: on one thread it is what the step would take on an
    idle core, and a busy neighbour does not change it. Wall-clock times are kept beside it.
    """
    task = tasks.task(task_name)
    stream = tasks.batches(tasks.split(task), task, seed)
    record = _header(MEMORY_TO_SPARE, Run(task_name, "all", 0.0, 1e-5, seed, rounds))
    trainers = [
        Trainer(Run(task_name, name, rate, 1e-5, seed, rounds), rounds + 2 * WARMUP_ROUNDS, ckpt)  # its middle is timed
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
    return record | {"rows": rows, "status": "finished", "finished": _now()}


def _timed(trainer: Trainer, window: Sequence[Tensor]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    trainer.step(window)
    return time.process_time() - cpu, time.perf_counter() - wall


def _saved_mib(trainer: Trainer, window: Sequence[Tensor]) -> float:
    """MiB of the tensors that autograd keeps from forward to backward, parameters not counted, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.method.deepest():
        loss = trainer.model(input_ids=window[0], labels=window[0]).loss
    mib = sum(kept.values()) / 2**20
    del loss
    return mib


def step_ratio(times: Iterable[Record], method: str, drop_rate: float, checkpointing: bool = False) -> float:
    """Mean step time of a method over plain training's, from the first record of `step_times` that has it.

    Raises:
        ConfigError: it was not measured.
    """
    row, plain = row_and_plain(times, method, drop_rate, checkpointing)
    return statistics.fmean(row["cpu_s"]) / statistics.fmean(plain["cpu_s"])


def row_and_plain(
    times: Iterable[Record], method: str, drop_rate: float, checkpointing: bool = False
) -> tuple[Record, Record]:
    """The row of a variant and that of plain training measured beside it. Raises ConfigError if there is none."""
    for record in times:
        rows = {(row["method"], row["drop_rate"], row["checkpointing"]): row for row in record["rows"]}
        if (method, drop_rate, checkpointing) in rows:
            return rows[method, drop_rate, checkpointing], rows["plain", 0.0, False]
    raise ConfigError(
        f"No step times of {method!r} at drop rate {drop_rate:g}{' with checkpointing' if checkpointing else ''} are "
        "among those measured; run the preset again."
    )


def _header(kind: str, run: Run) -> Record:
    versions = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    device = {**get_device("cpu").describe(), "threads": torch.get_num_threads()}
    settings = {"warmup_steps": WARMUP_STEPS, "weight_decay": WEIGHT_DECAY, "clip_norm": CLIP_NORM}
    config = {**asdict(run), "optimizer": "AdamW", **settings, "base": asdict(tasks.BASE)}
    config["task_settings"] = asdict(tasks.task(run.task))
    return {"schema": SCHEMA, "kind": kind, "config": config, "versions": versions, "device": device, "started": _now()}


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write(record: Record, path: Path) -> None:
    """Write a record, whole or not at all."""
    write_text(path, json.dumps(record, separators=(",", ":")) + "\n")


def read(folder: Path) -> list[Record]:
    """All records of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def loss_at(record: Record, axis: str, value: float) -> float | None:
    """Validation loss where the run had used `value` of "time" (in plain steps) or "flops"; None if it never did.

    Linear between the two evaluations around it; before the first one that one's.
    """
    points = [(e[axis], e["loss"]) for e in record["evaluations"] if e["loss"] is not None]
    for (x, a), (y, b) in zip([(0.0, points[0][1]), *points] if points else [], points, strict=False):
        if value <= y * (1 + 1e-6):
            return float(a + (b - a) * min(1.0, (value - x) / (y - x)))
    # A run ends with the first whole step beyond its budget, or one step before it where steps do not fit.
    return float(points[-1][1]) if points and value <= points[-1][0] * 1.02 else None


def timed_anew(record: Record, ratio: float) -> Record:
    """The record with the times of its evaluations by another step ratio."""
    return record | {"evaluations": [e | {"time": e["step"] * ratio} for e in record["evaluations"]]}


def equal_time_loss(record: Record) -> float:
    """Validation loss after as much time as plain training took; infinite for a run that failed."""
    loss = loss_at(record, "time", record["config"]["plain_steps"])
    return math.inf if loss is None or math.isnan(loss) else loss


# -- which runs


def variants(preset: Preset, task: tasks.Task) -> list[tuple[str, float]]:
    """Methods of the comparison with their drop rates, plain training first."""
    return [("plain", 0.0), *((name, rate) for name in preset.methods for rate in preset.drop_rates)]


def rivals_run_once(preset: Preset, task: tasks.Task) -> list[tuple[str, float]]:
    """Those run with the first seed only; LoRA is no rival where it is the setting."""
    return [(name, rate) for name, rate in preset.once if not (task.lora_rank and name == "lora")]


def first_runs(preset: Preset, chosen: Callable[[Preset, tasks.Task], list[tuple[str, float]]]) -> list[Run]:
    """Every variant chosen, on every task, at every learning rate, with the first seed."""
    return [
        Run(task.name, name, rate, learning_rate, preset.seeds[0], preset.plain_steps)
        for task in map(tasks.task, preset.tasks)
        for name, rate in chosen(preset, task)
        for learning_rate in rates_for(task, name)
    ]


def rates_for(task: tasks.Task, method: str) -> tuple[float, ...]:
    """Learning rates to try; LoRA beside full fine-tuning takes those of the LoRA task."""
    return tasks.task("prose-lora").learning_rates if method == "lora" else task.learning_rates


def further_runs(preset: Preset, records: Iterable[Record]) -> list[Run]:
    """Every variant at its best learning rate, with the other seeds."""
    best = best_rates(records)
    return [
        Run(task.name, name, rate, best[task.name, name, rate], seed, preset.plain_steps)
        for seed in preset.seeds[1:]
        for task in map(tasks.task, preset.tasks)
        for name, rate in variants(preset, task)
        if (task.name, name, rate) in best
    ]


def best_rates(records: Iterable[Record]) -> dict[tuple[str, str, float], float]:
    """Learning rate with the least loss at equal time, per (task, method, drop rate), by the lowest seed there is."""
    found: dict[tuple[str, str, float], tuple[int, float, float]] = {}
    for record in records:
        if record["kind"] != "run":
            continue
        config = record["config"]
        key = (config["task"], config["method"], config["drop_rate"])
        candidate = (config["seed"], equal_time_loss(record), config["learning_rate"])
        found[key] = min(found.get(key, candidate), candidate)
    return {key: learning_rate for key, (_, _, learning_rate) in found.items()}


# -- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a preset, or make tables from the files. Returns the exit status."""
    args = _parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    if not args.tables:
        _quiet_libraries()
        run_preset(PRESETS[args.preset], args.output, args.resume)
    from . import learning_tables

    learning_tables.write(read(args.output), args.docs, fresh=read(args.output / FRESH))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick", help="which runs (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="skip runs that are finished already")
    parser.add_argument("--tables", action="store_true", help="train nothing; make tables and plot from the files")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON files (default: %(default)s)")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where tables go (default: %(default)s)")
    return parser


def _quiet_libraries() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def run_preset(preset: Preset, folder: Path, resume: bool) -> None:
    """Step times first, then all runs; each is on disk as soon as it ends, whatever its end."""
    ratios = {name: _measured_times(preset, name, folder, resume) for name in preset.tasks}
    own = folder / preset.folder
    _run_all(first_runs(preset, variants), ratios, own, resume)
    _run_all(further_runs(preset, read(own)), ratios, own, resume)
    _run_all(first_runs(preset, rivals_run_once), ratios, own, resume)


def _measured_times(preset: Preset, task_name: str, folder: Path, resume: bool) -> list[Record]:
    """Step times with memory to spare; those with little of it are measured too, for the tables."""
    task = tasks.task(task_name)
    known = variants(preset, task) + rivals_run_once(preset, task)
    nested = [(f"{name} {CAPPED}", rate, False) for name, rate in known if name.startswith(("nested", "default"))]
    _measured(task_name, SHORT_OF_MEMORY, [("plain", 0.0, True), *nested], preset.timing_rounds, folder, resume)
    spare: list[Variant] = [(*which, False) for which in known if which[0] != "plain"]
    return _measured(task_name, MEMORY_TO_SPARE, spare, preset.timing_rounds, folder, resume)


def _measured(
    task_name: str, kind: str, wanted: Sequence[Variant], rounds: int, folder: Path, resume: bool
) -> list[Record]:
    """All step times of a kind; what is missing is measured beside plain training and goes to a file of its own."""
    known = of_kind(read(folder), kind, task_name) if resume else []
    rows = {(row["method"], row["drop_rate"], row["checkpointing"]) for record in known for row in record["rows"]}
    missing = [variant for variant in wanted if variant not in rows]
    if not missing:
        return known
    record = step_times(task_name, [("plain", 0.0, False), *missing], rounds) | {"kind": kind}
    number = f"-{len(known) + 1}" if known else ""
    write(record, folder / f"{task_name}--{kind.replace(' ', '-')}{number}.json")
    return [*known, record]


def of_kind(records: Iterable[Record], kind: str, task_name: str) -> list[Record]:
    """Records of a kind on a task."""
    return [r for r in records if r["kind"] == kind and r["config"]["task"] == task_name]


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
        write(record, path)
        if record["status"] == "cancelled":
            raise KeyboardInterrupt(f"cancelled in {run.name}; --resume goes on from here")


def _is_finished(path: Path, ratio: float) -> bool:
    """Whether the run ended, and by the present step times not before plain training would have."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"status": "missing"}
    return record["status"] == "finished" and math.isfinite(equal_time_loss(timed_anew(record, ratio)))


if __name__ == "__main__":
    sys.exit(main())
