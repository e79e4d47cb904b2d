"""The cost of `DropBPCallback` for a trainer: the time inside its events, as a share of the optimizer step.

Every event of the callback and the step itself are timed from outside, in the thread's processor time, so other
processes on the machine matter less. `dropbp bench overhead` measures what masks and statistics cost in the forward.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import tempfile
import time
from typing import Any

import torch

from dropbp.device import get_device

from ..common import records
from ..common.options import add_run_arguments, prepare_run
from ..common.small import small_llama

KIND = "callback_overhead"
TARGET_SHARE = 0.01
EVENTS = ("on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")
WARM_STEPS = 3
VOCABULARY = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="of the model (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps, each one logged (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the record instead of a sentence")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the record and print the results."""
    prepare_run(args)
    layers, width, steps = (2, 32, 6) if args.smoke else (args.layers, args.width, args.steps)
    configuration = {"layers": layers, "width": width, "steps": steps, "batch_size": 4, "sequence_length": 128}
    store, name = records.Store(args.output, KIND), f"llama-{layers}x{width}"
    record = store.measured(name, configuration, get_device("cpu"), lambda: measure(**configuration), again=args.again)
    sys.stdout.write(json.dumps(record, indent=2) + "\n" if args.json else _sentence(record))
    return 0


def measure(layers: int, width: int, steps: int, batch_size: int = 4, sequence_length: int = 128) -> dict[str, Any]:
    """Seconds of each step and of the callback's events within it, and the median share."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from dropbp.integrations.transformers import DropBPCallback

    callback = DropBPCallback(0.5)
    clock = _Clock(callback)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps + WARM_STEPS + 1, per_device_train_batch_size=batch_size,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        data = _rows(batch_size * (steps + WARM_STEPS + 1), sequence_length)
        model = small_llama(layers, width, vocab_size=VOCABULARY, intermediate_size=2 * width)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.result()


class _Clock:
    """Times the events of a callback, from the start of one step to the start of the next."""

    def __init__(self, callback: Any) -> None:
        self.inside_s, self.marks = 0.0, [(0.0, 0.0)]
        for name in EVENTS:
            setattr(callback, name, functools.partial(self._timed, name, getattr(callback, name)))

    def _timed(self, name: str, event: Any, *args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        if name == "on_step_begin":
            self.marks.append((begin, self.inside_s))
        result = event(*args, **kwargs)
        self.inside_s += time.thread_time() - begin
        return result

    def result(self) -> dict[str, Any]:
        marks = self.marks[1 + WARM_STEPS :]
        step_s = [after[0] - before[0] for before, after in itertools.pairwise(marks)]
        events_s = [after[1] - before[1] for before, after in itertools.pairwise(marks)]
        shares = [events / step for events, step in zip(events_s, step_s, strict=True)]
        median = {"step_ms": statistics.median(step_s) * 1e3, "events_ms": statistics.median(events_s) * 1e3}
        return {
            "step_s": step_s,
            "events_s": events_s,
            **median,
            "share": statistics.median(shares),
            "target": TARGET_SHARE,
        }


def _rows(count: int, length: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(1, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _sentence(record: dict[str, Any]) -> str:
    return (
        f"the callback's events take {record['events_ms']:.3f} ms of a step of {record['step_ms']:.1f} ms: "
        f"{record['share']:.2%}, target {record['target']:.0%}\n"
    )
