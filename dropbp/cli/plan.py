"""The command `dropbp plan`: time, memory and FLOPs of a training step at each drop rate, before any training.

The model is built from its configuration with random weights, in the way `dropbp finetune` would train it: neither time
nor memory depends on what a weight is, so nothing is downloaded but the configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbp.cli.figures import label_axes, new_figure, save_figure
from dropbp.cli.libraries import quiet
from dropbp.cli.options import MOST_MICRO_BATCHES, check_amounts, check_counts, check_file
from dropbp.errors import ConfigError
from dropbp.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

GIB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("model", metavar="MODEL", help="Hub id, model folder, or config.json")
    parser.add_argument("--batch-size", type=int, default=1, help="rows per micro-batch (%(default)s)")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens per row (512, or the model's maximum if that is less)"
    )
    parser.add_argument(
        "--gradient-accumulation", type=int, default=1, help="micro-batches per optimizer step (%(default)s)"
    )
    parser.add_argument(
        "--drop-rate", type=float, action="append", metavar="P", help="drop rate; may be repeated (0, 0.5, 0.75, 0.875)"
    )
    parser.add_argument("--masks", default="nested", help="mask sampler: nested, exact, ... (%(default)s)")
    parser.add_argument(
        "--steps", type=int, help="training forwards of the run; nested masks then anneal, as in the Trainer"
    )
    parser.add_argument("--peft", choices=("lora", "none"), default="lora", help="what to train (%(default)s)")
    parser.add_argument("--bf16", action="store_true", help="mixed precision; with LoRA, frozen weights are bf16 too")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, hpu, ...; an error if unavailable (%(default)s)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="memory available (all of the device's)")
    parser.add_argument("--no-measure", action="store_true", help="only count memory and FLOPs; time no step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a PNG (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Plan, print, write. Raises DropBPError for bad input."""
    _check(args)
    with quiet():
        found = plan_model(args, progress_note())
    publish(found, args, _table, plot)
    return 0


def publish(
    found: dict[str, Any],
    args: argparse.Namespace,
    table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> None:
    """Print what was found as a table or as JSON, and write and plot it where the options say so."""
    text = json.dumps(found, indent=1)
    if args.output is not None:
        write_text(args.output, text + "\n")
    if args.plot is not None:
        plot(found, args.plot)
    sys.stdout.write((text if args.json else table(found)) + "\n")


def plan_model(args: argparse.Namespace, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """The plan of a model that is built for it, as plain types."""
    from dropbp.estimate.plan import DROP_RATES, plan

    model = _model(args)
    found = plan(
        model,
        args.batch_size,
        args.sequence_length,
        drop_rates=args.drop_rate or DROP_RATES,
        masks=args.masks,
        device=args.device,
        precision="bf16" if args.bf16 else None,
        accumulation=args.gradient_accumulation,
        memory_limit=None if args.memory_limit is None else int(args.memory_limit * GIB),
        measure=not args.no_measure,
        progress=progress,
        steps=args.steps,
    )
    return {**found.as_dict(), "model": args.model, "peft": args.peft}


def plot(found: dict[str, Any], path: Path) -> None:
    """Time, memory and FLOPs against the drop rate, relative to the first rate, and the largest sizes, as a PNG file.

    Raises MissingDependencyError if matplotlib is not installed.
    """
    figure = new_figure(10, 4)
    costs, sizes = figure.subplots(1, 2)
    first, limit = found["rates"][0]["drop_rate"], found["memory_limit_bytes"] / GIB
    lines = {"step_s": "step time", "peak_bytes": "peak memory", "flops": "FLOPs"}
    _draw(costs, found, lines, f"relative to drop rate {first:g}")
    costs.set_ylim(bottom=0)
    lines = {"largest_batch": "largest batch", "largest_sequence": "longest sequence"}
    _draw(sizes, found, lines, f"relative, in {limit:.3g} GiB")
    save_figure(figure, path)


def _draw(axes: Axes, found: dict[str, Any], lines: dict[str, str], label: str) -> None:
    rates = [entry["drop_rate"] for entry in found["rates"]]
    for key, name in lines.items():
        values = [entry[key] for entry in found["rates"]]
        if all(value is not None for value in values) and values[0]:
            axes.plot(rates, [value / values[0] for value in values], marker="o", label=name)
    label_axes(axes, "drop rate", label)


def _model(args: argparse.Namespace) -> nn.Module:
    import torch

    from dropbp.cli.models import load_config, new_model, with_lora
    from dropbp.device import get_device

    get_device(args.device)  # what is not there is said before a model is built
    model = new_model(load_config(args.model))
    frozen_bf16 = args.bf16 and args.peft == "lora"  # trained weights stay in fp32, under autocast
    model.to(torch.bfloat16 if frozen_bf16 else torch.float32)
    model.config.use_cache = False
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    adapted: Any = with_lora(model, 0) if args.peft == "lora" else model
    placed: nn.Module = adapted.to(args.device).train()
    return placed


def _check(args: argparse.Namespace) -> None:
    check_counts(args, ("batch_size", "sequence_length", "steps"))
    check_counts(args, ("gradient_accumulation",), MOST_MICRO_BATCHES)
    check_amounts(args, ("memory_limit",))
    if args.memory_limit is not None and not 1 <= args.memory_limit * GIB <= sys.float_info.max:
        raise ConfigError(f"--memory-limit {args.memory_limit} must be a number of GiB, at least one byte.")
    check_file("--output", args.output)
    check_file("--plot", args.plot, ".png")


def progress_note() -> Callable[[str], None] | None:
    """A function that shows the current work on one line of the terminal; None if standard error is no terminal."""
    if not sys.stderr.isatty():
        return None

    def note(line: str) -> None:
        sys.stderr.write(f"\r\033[K{line}")
        sys.stderr.flush()

    return note


def _table(found: dict[str, Any]) -> str:
    from dropbp.estimate.forecast import plan_table

    return f"{found['model']}, {'LoRA' if found['peft'] == 'lora' else 'all weights'}\n{plan_table(found)}"
