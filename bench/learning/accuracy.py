"""Fine-tunes with the paper's settings and evaluates on its tasks, if models and data are available.

Evaluation is EleutherAI's harness (`pip install lm-eval`); fine-tuning is `dropbp finetune`. This module only holds the
paper's tasks, data sets and hyper-parameters, as data. Models, data sets and tasks may be local folders and files.
Source: arXiv:2402.17812, tables 1, 2 and the table of hyper-parameters.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dropbp.cli.rows import Row, read_rows
from dropbp.device import get_device
from dropbp.errors import ConfigError, MissingDependencyError
from dropbp.files import write_text

from ..common import records
from ..common.options import add_run_arguments, prepare_run
from ..common.presets import chosen

KIND = "accuracy"


@dataclass(frozen=True)
class Task:
    """A task of the harness: the number of examples before the question, and the reported metric."""

    name: str
    shots: int
    metric: str


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("mmlu", 5, "acc"),
        Task("piqa", 0, "acc_norm"),
        Task("hellaswag", 0, "acc_norm"),
        Task("winogrande", 0, "acc"),
        Task("arc_easy", 0, "acc_norm"),
        Task("arc_challenge", 0, "acc_norm"),
        Task("openbookqa", 0, "acc_norm"),
    )
}


@dataclass(frozen=True)
class Hyperparameters:
    """The paper's training settings: AdamW, cosine schedule, bf16."""

    learning_rate: float
    peft: str
    micro_batch: int = 2
    accumulation: int = 64
    warmup_steps: int = 100
    max_length: int = 512


TUNINGS: Mapping[str, Hyperparameters] = {
    "lora": Hyperparameters(1e-4, "lora"),  # rank 8, alpha 16, dropout .05, all linear layers, weight decay .01
    "full": Hyperparameters(2e-5, "none"),  # weight decay .02
}


def from_pairs(rows: Sequence[Row]) -> list[Row]:
    """Alpaca and Dolly: `dropbp finetune` reads their columns unchanged."""
    return list(rows)


def from_oasst(rows: Sequence[Row]) -> list[Row]:
    """OASST1's message trees as conversations: from the root down, always the best-ranked reply.

    Only English conversations that end with the assistant are taken.
    """
    replies: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("parent_id"):
            replies[row["parent_id"]].append(row)
    roots = [row for row in rows if not row.get("parent_id") and row.get("lang", "en") == "en"]
    threads = [_best_thread(root, replies) for root in roots]
    return [{"messages": thread} for thread in threads if len(thread) > 1]


def _best_thread(root: Row, replies: Mapping[str, Sequence[Row]]) -> list[dict[str, str]]:
    thread, message = [_message(root)], root
    while replies.get(message["message_id"]):
        message = min(replies[message["message_id"]], key=lambda row: row.get("rank") or 0)
        thread.append(_message(message))
    return thread if thread[-1]["role"] == "assistant" else thread[:-1]


def _message(row: Row) -> dict[str, str]:
    return {"role": "user" if row["role"] == "prompter" else "assistant", "content": row["text"]}


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and the columns that identify it."""

    hub: str
    columns: tuple[str, ...]


DATA: Mapping[str, DataSet] = {
    "alpaca": DataSet("tatsu-lab/alpaca", ("instruction", "input", "output")),
    "dolly": DataSet("databricks/databricks-dolly-15k", ("instruction", "context", "response")),
    "oasst1": DataSet("OpenAssistant/oasst1", ("message_id", "parent_id", "text", "role")),
}
_CONVERTERS = {"oasst1": from_oasst}


def load_data(name: str, source: str | None = None) -> list[Row]:
    """Rows that `dropbp finetune` reads, from the Hub or from a file in the data set's own format.

    Raises:
        ConfigError: the data set is unknown or not available, or a row lacks a column.
    """
    data = chosen("data set", DATA, name)
    rows = read_rows(source or data.hub)
    missing = [column for column in data.columns if column not in rows[0]]
    if missing:
        raise ConfigError(f"{source} is not in the format of {name}: no column {missing[0]!r} among {sorted(rows[0])}.")
    converted = _CONVERTERS.get(name, from_pairs)(rows)
    if not converted:
        raise ConfigError(f"{source or data.hub} holds no conversation that ends with the assistant.")
    return converted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="causal language model")
    parser.add_argument("--data", choices=tuple(DATA), help="fine-tune on this first; without it, only evaluate")
    parser.add_argument("--source", metavar="FILE", help="the data set in a local file, in its own format")
    parser.add_argument("--tuning", choices=tuple(TUNINGS), default="lora", help="what to train (%(default)s)")
    parser.add_argument("--drop-rate", type=float, default=0.875, help="0 trains plainly (%(default)s)")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the data (%(default)s)")
    parser.add_argument("--max-steps", type=int, help="optimizer steps; overrides --epochs")
    parser.add_argument("--tasks", nargs="*", metavar="TASK", help=f"of the harness ({', '.join(TASKS)})")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), metavar="DIR", help="models (%(default)s)")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Fine-tune if asked to, evaluate, and keep a record."""
    prepare_run(args)
    _harness()  # before hours of training
    configuration = {name: getattr(args, name) for name in _RECORDED} | {
        "hyperparameters": asdict(TUNINGS[args.tuning])
    }
    name = "--".join([Path(args.model).name, args.data or "untuned", args.tuning, f"p{args.drop_rate:g}"])

    def measure() -> dict[str, Any]:
        trained = args.model if args.data is None else _finetune(args, args.work / name)
        tasks = args.tasks or tuple(TASKS)
        return {"results": evaluate(trained, tasks, args.device, args.limit, base=args.model)}

    store, device = records.Store(args.output, KIND), get_device(args.device)
    found = store.measured(name, configuration, device, measure, again=args.again)
    sys.stdout.write(json.dumps(found["results"], indent=2) + "\n")
    return 0


_RECORDED = ("data", "tuning", "drop_rate", "epochs", "max_steps", "tasks", "limit", "device")


def _finetune(args: argparse.Namespace, folder: Path) -> str:
    from dropbp.cli import finetune

    data = folder / "data.jsonl"
    write_text(data, "".join(json.dumps(row) + "\n" for row in load_data(args.data, args.source)))
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    finetune.run(parser.parse_args(finetune_arguments(args, data, folder / "model")))
    return str(folder / "model")


def finetune_arguments(args: argparse.Namespace, data: Path, output: Path) -> list[str]:
    """The options of `dropbp finetune` that are the paper's settings."""
    settings = TUNINGS[args.tuning]
    options: dict[str, Any] = {
        "model": args.model,
        "dataset": data,
        "output": output,
        "device": args.device,
        "peft": settings.peft,
        "learning-rate": settings.learning_rate,
        "batch-size": settings.micro_batch,
        "gradient-accumulation": settings.accumulation,
        "warmup-steps": settings.warmup_steps,
        "max-length": settings.max_length,
        "max-steps": args.max_steps,
        "epochs": args.epochs,
        "drop-rate": args.drop_rate or None,
    }
    given = [item for name, value in options.items() if value is not None for item in (f"--{name}", str(value))]
    return [*given, "--bf16", *([] if args.drop_rate else ["--plain"])]


def evaluate(
    model: str, tasks: Iterable[str], device: str, limit: int | None = None, base: str | None = None
) -> dict[str, float]:
    """Score of each task by the harness. Tasks that are not the paper's are asked without examples.

    Args:
        model: a folder or Hub id; a folder with LoRA adapters alone needs `base`.
        tasks: names of harness tasks, or files of local tasks.
        device: where to evaluate.
        limit: questions per task.
        base: the model that adapters belong to.

    Raises:
        MissingDependencyError: the harness is not installed.
    """
    harness, scores = _harness(), {}
    arguments = f"pretrained={model},dtype=bfloat16"
    if base is not None and (Path(model) / "adapter_config.json").is_file():
        arguments = f"pretrained={base},peft={model},dtype=bfloat16"
    for name in tasks:
        task = TASKS.get(name, Task(name, 0, "acc"))
        found = harness.simple_evaluate(
            model="hf", model_args=arguments, tasks=[task.name], num_fewshot=task.shots, device=device, limit=limit
        )
        scores[name] = float(found["results"][Path(name).stem][f"{task.metric},none"])
    return scores


def _harness() -> Any:
    try:
        return importlib.import_module("lm_eval")
    except ImportError as error:
        raise MissingDependencyError(
            "bench accuracy needs EleutherAI's lm-eval, which is not installed; install it with: pip install lm-eval"
        ) from error
