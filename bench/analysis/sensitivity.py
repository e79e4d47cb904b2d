"""Sensitivities in one pass, compared with the paper's N+1 passes: agreement, cost, and the resulting rates.

Small language models are trained briefly on the sources of the standard library: a Llama, a GPT-2 (tied weights,
biases, learned positions), and the Llama with LoRA adapters trained on English. Both methods measure every branch on
several batches. The file holds the raw sensitivities; everything shown is derived from them. Overhead is measured on a
deep model: calibration time over the time of an ordinary training step, with both interleaved.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dropbp
from dropbp.cli.models import with_lora
from dropbp.device import get_device

from ..common import markdown, records
from ..common.corpus import Windows, english_prose, source_code
from ..common.options import add_run_arguments, prepare_run, progress
from ..common.small import small_gpt2, small_llama, train_briefly

KIND = FILE = "sensitivity"
DROP_RATES = (0.5, 0.75, 0.875)
TARGETS = {"spearman_mean": 0.95, "spearman_least": 0.9, "objective": 1.02, "steps": 3.0, "forwards": 2}
TEXT_BYTES = 400_000
AGREEMENT_COLUMNS = (
    "model",
    "p",
    "Spearman, single batches (least)",
    "averaged",
    "objective / exact's, single (worst)",
    "averaged",
    "exact of another batch",
    "uniform rates",
)
Rows = Sequence[Sequence[float]]
Found = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """Model sizes, length of training, and number of batches measured."""

    layers: int = 8
    width: int = 64
    steps: int = 200
    adapter_steps: int = 40
    learning_rate: float = 3e-3
    rows: int = 8
    length: int = 64
    batches: int = 8
    deep_layers: int = 80
    deep_width: int = 32
    rounds: int = 5
    seed: int = 0


SMOKE = Setting(layers=2, width=16, steps=2, adapter_steps=2, rows=2, length=16, batches=2, deep_layers=4, rounds=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print the record instead of a table")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the file and print the table."""
    prepare_run(args)
    setting = SMOKE if args.smoke else Setting()
    path = args.output / f"{FILE}{'-smoke' if args.smoke else ''}.json"
    record = None if args.again or not path.is_file() else records.read(path)
    if record is None or record["configuration"] != asdict(setting):
        record = measure(setting)
        records.write(record, path)
    sys.stdout.write(json.dumps(record, indent=1) + "\n" if args.json else table(record) + "\n")
    return 0


def measure(setting: Setting) -> records.Record:
    """Measure everything; returns the complete record."""
    record = records.new_record(KIND, FILE, asdict(setting), get_device("cpu"))
    with progress(4, "sensitivities") as bar:
        llama = _trained(small_llama(setting.layers, setting.width), source_code, setting, setting.steps)
        models = {"llama": lambda: llama, "gpt2": lambda: _gpt2(setting), "lora": lambda: _lora(llama, setting)}
        record["models"] = {}
        for name, make in models.items():
            text = _windows(english_prose if name == "lora" else source_code, setting, setting.seed + 7)
            record["models"][name] = measured(make(), text, setting)
            bar.update()
        record["overhead"] = overhead(setting)
        bar.update()
    record["status"], record["ended"] = "finished", records.now()
    return record


def measured(model: Any, text: Windows, setting: Setting) -> Found:
    """Raw sensitivities of every branch on every batch by both methods, and the number of forwards and backwards of
    each.
    """
    found: Found = {"one-pass": [], "exact": []}
    with dropbp.enable(model, masks="exact", example_inputs={"input_ids": text.batch()}) as handle:
        found["branches"] = [branch.name for branch in handle.branches]
        found["flops"] = [branch.flops for branch in handle.branches]
        for batch in [text.batch() for _ in range(setting.batches)]:
            for method in ("one-pass", "exact"):
                closure = _Counted(lambda batch=batch: _loss(model, batch))  # type: ignore[misc]
                result = handle.calibrate(closure, method=method, set_rates=False)
                found[method].append(list(result.sensitivities))
                found[f"{method} passes"] = {"forward": closure.calls, "backward": result.passes}
    return found


def overhead(setting: Setting) -> Found:
    """Seconds of calibrations and of ordinary steps (forward, backward, AdamW) of a deep model, interleaved."""
    model = small_llama(setting.deep_layers, setting.deep_width)
    batch = _windows(source_code, setting).batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        _loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with dropbp.enable(model, 0.0, masks="exact") as handle:
        ways: dict[str, Callable[[], Any]] = {
            "step_cpu_s": step,
            "calibration_cpu_s": lambda: handle.calibrate(lambda: _loss(model, batch), set_rates=False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(setting.rounds + 1):  # the first warms up
            for name, way in ways.items():
                start = time.process_time()
                way()
                seconds[name].append(time.process_time() - start)
        branches = len(handle.branches)
    return {"layers": setting.deep_layers, "branches": branches, **{name: s[1:] for name, s in seconds.items()}}


# -- derived from the record alone


def objective(sensitivities: Sequence[float], rates: Sequence[float]) -> float:
    """The objective that an allocation minimises."""
    return math.fsum(s * p * p for s, p in zip(sensitivities, rates, strict=True))


def agreement(one_pass: Sequence[float], exact: Sequence[float], flops: Sequence[float], drop_rate: float) -> Found:
    """One-pass compared with exact: rank correlation, and the exact objective of its allocation over the minimum."""
    from scipy.stats import spearmanr

    best = objective(exact, dropbp.allocate(exact, flops, drop_rate))
    rates = dropbp.allocate(one_pass, flops, drop_rate)
    return {
        "spearman": float(spearmanr(one_pass, exact).statistic),
        "objective_ratio": objective(exact, rates) / best,
        "uniform_ratio": objective(exact, [drop_rate] * len(flops)) / best,
        "rates": list(rates),
    }


def derived(model: Found, drop_rate: float) -> Found:
    """Agreement on every batch and of the means over batches, and how well exact values of one batch serve another."""
    flops, quick, exact = model["flops"], model["one-pass"], model["exact"]
    single = [agreement(a, b, flops, drop_rate) for a, b in zip(quick, exact, strict=True)]
    return {
        "single": single,
        "averaged": agreement(mean(quick), mean(exact), flops, drop_rate),
        "other_batch": [agreement(a, b, flops, drop_rate) for a, b in zip(exact, [*exact[1:], exact[0]], strict=True)],
    }


def mean(rows: Rows) -> list[float]:
    """Mean of each column."""
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def table(record: records.Record) -> str:
    """Markdown table of agreement, rates and cost, from the record alone."""
    return "\n\n".join([_agreement_table(record), _rates_table(record), _cost_lines(record)])


def read(root: Path = records.RESULTS) -> records.Record:
    """The committed record."""
    return records.read(root / f"{FILE}.json")


def _agreement_table(record: records.Record) -> str:
    rows = [_agreement_row(name, rate, derived(m, rate)) for name, m in record["models"].items() for rate in DROP_RATES]
    return markdown.table(AGREEMENT_COLUMNS, rows)


def _agreement_row(name: str, rate: float, found: Found) -> Sequence[str]:
    ranks = [one["spearman"] for one in found["single"]]
    ratios = [one["objective_ratio"] for one in found["single"]]
    other = statistics.fmean(one["objective_ratio"] for one in found["other_batch"])
    averaged = found["averaged"]
    return (
        name,
        f"{rate:g}",
        f"{statistics.fmean(ranks):.3f} ({min(ranks):.3f})",
        f"{averaged['spearman']:.3f}",
        f"{statistics.fmean(ratios):.3f} ({max(ratios):.3f})",
        f"{averaged['objective_ratio']:.3f}",
        f"{other:.3f}",
        f"{averaged['uniform_ratio']:.2f}",
    )


def _rates_table(record: records.Record) -> str:
    rows = []
    for name, model in record["models"].items():
        for rate in DROP_RATES:
            rates = derived(model, rate)["averaged"]["rates"]
            quartiles = statistics.quantiles(rates, n=4, method="inclusive")
            numbers = ", ".join(f"{value:.2f}" for value in (min(rates), *quartiles, max(rates)))
            rows.append((name, f"{rate:g}", numbers))
    return markdown.table(("model", "p", "rates from averaged one-pass: least, quartiles, largest"), rows, "lrl")


def _cost_lines(record: records.Record) -> str:
    deep = record["overhead"]
    step_s, calibration_s = (statistics.median(deep[key]) for key in ("step_cpu_s", "calibration_cpu_s"))
    passes = next(iter(record["models"].values()))["one-pass passes"]
    return (
        f"One-pass runs {passes['forward']} forwards and {passes['backward']} backward. On a model of "
        f"{deep['layers']} layers ({deep['branches']} branches) it takes {calibration_s / step_s:.2f} ordinary steps "
        f"of CPU time (target: under {TARGETS['steps']:g})."
    )


# -- models and text


def _windows(source: Callable[[int], str], setting: Setting, seed: int = 0) -> Windows:
    return Windows(source(TEXT_BYTES), setting.rows, setting.length, seed)


class _Counted:
    def __init__(self, closure: Callable[[], Tensor]) -> None:
        self.closure, self.calls = closure, 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self.closure()


def _loss(model: Any, ids_BS: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids_BS, labels=ids_BS).loss
    return loss


def _trained(model: Any, source: Callable[[int], str], setting: Setting, steps: int) -> Any:
    train_briefly(model, _windows(source, setting).batch, steps, setting.learning_rate)
    return model


def _gpt2(setting: Setting) -> Any:
    model = small_gpt2(setting.layers, setting.width, seed=setting.seed)
    return _trained(model, source_code, setting, setting.steps)


def _lora(llama: Any, setting: Setting) -> Any:
    """The trained Llama with LoRA adapters, which are then trained on another text."""
    adapted = with_lora(llama, setting.seed, lora_dropout=0.0).train()
    return _trained(adapted, english_prose, setting, setting.adapter_steps)
