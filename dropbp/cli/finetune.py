"""The command `dropbp finetune`: fine-tunes a model on a data set; without one it runs the demo.

The demo fine-tunes a small chat model twice, plainly and with DropBP, and compares. With `--model` and `--dataset` the
command fine-tunes, evaluates and saves one model. Defaults are those of the paper (arXiv:2402.17812).
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dropbp.cli.libraries import quiet
from dropbp.cli.options import MOST, check_amounts, check_counts, check_folder, check_seed, check_shares
from dropbp.errors import ConfigError

RESULT_FILE, PLOT_FILE = "result.json", "result.png"
_COUNTS = ("max_length", "max_steps", "batch_size", "gradient_accumulation", "save_steps", "eval_steps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    _add_data_arguments(parser)
    _add_dropbp_arguments(parser)
    _add_training_arguments(parser)
    _add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command. Raises DropBPError for bad input; after Ctrl-C, KeyboardInterrupt says what is kept."""
    _check(args)
    _check_packages(args)
    with quiet():
        program = importlib.import_module("dropbp.cli.demo" if args.dataset is None else "dropbp.cli.causal_lm")
        result, output = program.run(args)
    _show(result, output, args.json)
    return 0


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data", "without --dataset, the demo runs on multiple-choice questions")
    group.add_argument("--model", metavar="DIR_OR_HUB_ID", help="causal language model (demo: SmolLM2-135M-Instruct)")
    group.add_argument(
        "--dataset",
        metavar="FILE_OR_HUB_ID",
        help="rows as .jsonl, .json, .csv, .txt, .parquet, or a Hub id; columns messages, conversations, "
        "instruction + output, instruction + response, prompt + completion, or text",
    )
    group.add_argument(
        "--eval-fraction", type=float, default=0.05, help="share of examples held out for evaluation (%(default)s)"
    )
    group.add_argument("--max-length", type=int, default=512, help="maximum tokens per example (%(default)s)")


def _add_dropbp_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("DropBP")
    group.add_argument("--drop-rate", type=float, default=0.5, help="share of backward FLOPs to skip (%(default)s)")
    group.add_argument("--masks", default="nested", help="mask sampler: nested, exact, ... (%(default)s)")
    group.add_argument(
        "--activation-cache",
        nargs="?",
        const=True,
        metavar="DIR",
        help="let rows seen before skip the blocks that no longer train; keeps states in memory, or in DIR",
    )
    group.add_argument("--plain", action="store_true", help="train without DropBP")


def _add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--peft", choices=("lora", "none"), default="lora", help="what to train (%(default)s)")
    group.add_argument("--max-steps", type=int, help="optimizer steps; overrides --epochs")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data (%(default)s)")
    group.add_argument("--batch-size", type=int, help="examples per micro-batch (2)")
    group.add_argument("--gradient-accumulation", type=int, help="micro-batches per optimizer step (64)")
    group.add_argument("--learning-rate", type=float, help="peak learning rate (1e-4 with LoRA, 2e-5 without)")
    group.add_argument(
        "--warmup-steps", type=int, default=100, help="warm-up steps, at most a tenth of all (%(default)s)"
    )
    group.add_argument(
        "--logits",
        choices=("all", "labelled"),
        help="labelled: compute logits only where a label is, for the same loss (all; demo: labelled)",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--bf16", action="store_true", help="mixed precision; with LoRA, frozen weights are bf16 too")
    group.add_argument("--seed", type=int, default=0, help="seed of data order, adapters and masks (%(default)s)")


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--device", help="cpu, cuda, hpu, ...; an error if it is not available")
    group.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for all results (runs/finetune; demo: runs/demo)"
    )
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    group.add_argument("--save-steps", type=int, help="steps between checkpoints (a tenth of all)")
    group.add_argument("--eval-steps", type=int, help="steps between evaluations (a tenth of all)")
    group.add_argument("--report-to", default="none", help="tensorboard, wandb, ... (%(default)s)")
    group.add_argument("--json", action="store_true", help="print only the result, as JSON")


def _check(args: argparse.Namespace) -> None:
    if args.model is None and args.dataset is not None:
        raise ConfigError("--dataset needs --model; without --dataset the demo runs on its own questions.")
    if args.dataset is None and args.resume:
        raise ConfigError("--resume needs --model and --dataset; the demo keeps no checkpoints.")
    if args.activation_cache is not None:
        _check_cache(args)
    check_shares(args, ("drop_rate", "eval_fraction"))
    check_amounts(args, ("epochs", "learning_rate", *_COUNTS))
    check_counts(args, _COUNTS)
    check_seed(args.seed)
    if not 0 <= args.warmup_steps <= MOST:
        raise ConfigError(f"--warmup-steps {args.warmup_steps} must be from 0 to {MOST:,}.")
    if args.output is not None:
        check_folder("--output", args.output)


def _check_packages(args: argparse.Namespace) -> None:
    """Name a package that the demo lacks before it downloads anything."""
    for name in ("accelerate",) if args.model else ("gguf", "accelerate"):
        if args.dataset is None and find_spec(name) is None:
            raise ModuleNotFoundError(name=name)  # the command explains it


def _check_cache(args: argparse.Namespace) -> None:
    if args.dataset is None or args.plain:
        raise ConfigError("--activation-cache needs --model and --dataset, and cannot be combined with --plain.")
    if args.activation_cache is not True:
        check_folder("--activation-cache", Path(args.activation_cache))


def _show(result: dict[str, Any], output: Path, as_json: bool) -> None:
    from dropbp.cli import report

    report.write_result(result, output / RESULT_FILE)
    if find_spec("matplotlib"):
        report.plot(result, output / PLOT_FILE)
    sys.stdout.write(json.dumps(result, indent=1) + "\n" if as_json else _text(result, output))


def _text(result: dict[str, Any], output: Path) -> str:
    from dropbp.cli import report

    plot = output / PLOT_FILE if find_spec("matplotlib") else "not drawn; needs matplotlib: pip install 'dropbp[bench]'"
    paths = [f"result  {output / RESULT_FILE}", f"plot    {plot}"]
    parts = [report.shown_answers(result), report.table(result), "\n".join(report.verdict(result)), "\n".join(paths)]
    return "\n" + "\n\n".join(filter(None, parts)) + "\n"
