"""Savings of the activation cache over whole runs of several epochs: plain, DropBP, DropBP with the cache, and frozen.

Each of the four runs has its own weights and optimizer, and all see the same shuffled rows. On CPU they take turns step
by step, on one PyTorch thread, and process time is measured, so other processes on the machine matter less. On an
accelerator, where models are large, they run one after the other, and wall time is measured.

Shapes: B micro-batch, S sequence.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dropbp
from dropbp.cli.models import with_lora
from dropbp.device import Device, get_device

from ..common import records
from ..common.models import build_model
from ..common.options import add_run_arguments, prepare_run, progress
from ..common.presets import MODELS, Training
from ..common.small import small_llama

KIND = "activation_cache"
SIZES = {"layers": 8, "width": 512, "sequence_length": 256, "batch_size": 2, "vocabulary": 1024}
NAMED = {"sequence_length": 512, "batch_size": 2}
SMALL = {"layers": 4, "width": 32, "sequence_length": 16, "batch_size": 2, "vocabulary": 64}
VARIANTS = ("plain", "dropbp", "dropbp, cached", "frozen")
RUNS = (("full", 0.75), ("full", 0.875), ("lora", 0.75))
EPOCHS = 3
Enable = Callable[[nn.Module], Any]
Sizes = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", choices=tuple(MODELS), help="a model by its name, in bf16, instead of a small one")
    parser.add_argument("--width", type=int, help=f"of the model ({SIZES['width']})")
    parser.add_argument("--sequence-length", type=int, help=f"tokens of a row ({SIZES['sequence_length']})")
    parser.add_argument("--steps", type=int, default=10, help="of an epoch (%(default)s)")
    parser.add_argument("--only", choices=[f"{tuning}-{rate:g}" for tuning, rate in RUNS], help="this run alone")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write a record per run and print the results."""
    prepare_run(args)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _run(args)
    finally:
        torch.set_num_threads(threads)


def _run(args: argparse.Namespace) -> int:
    given = {name: value for name in SIZES if (value := getattr(args, name, None)) is not None}
    sizes = {**(SMALL if args.smoke else NAMED if args.model else SIZES), **given}
    if args.model:
        sizes["model"] = args.model
    store, device = records.Store(args.output, KIND), get_device(args.device)
    for tuning, rate in RUNS:
        run = f"{tuning}-{rate:g}"
        name = f"{args.model}--{device.name}--{run}" if args.model else run
        if args.only in (None, run):
            configuration = {**sizes, "tuning": tuning, "drop_rate": rate, "steps": 3 if args.smoke else args.steps}
            work = functools.partial(measure, sizes, tuning, rate, configuration["steps"], device)
            record = store.measured(name, configuration, device, work, again=args.again)
            sys.stdout.write(f"{name}: {figures(record)}\n")
    return 0


def measure(sizes: Sizes, tuning: str, drop_rate: float, steps: int, device: Device) -> dict[str, Any]:
    """Seconds of each step of each variant, the steps that were shortened, and the cache's report."""
    vocabulary = MODELS[sizes["model"]].vocabulary if "model" in sizes else sizes["vocabulary"]
    shape = steps * sizes["batch_size"], sizes["sequence_length"]
    rows_NS = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device.name)
    found: dict[str, Any] = {"step_s": {}, "losses": {}}
    with progress(EPOCHS * steps * len(VARIANTS), f"{tuning} p={drop_rate:g}") as bar:
        for together in (VARIANTS,) if device.name == "cpu" else ((name,) for name in VARIANTS):
            runs = {name: _Variant(name, sizes, tuning, drop_rate, steps * EPOCHS, device) for name in together}
            for ids_BS in _batches(rows_NS, sizes["batch_size"]):
                for each in runs.values():
                    each.step(ids_BS)
                    bar.update()
            for name, each in runs.items():
                found["step_s"][name], found["losses"][name] = each.step_s, each.losses
                if name == "dropbp, cached":
                    found |= {"shortened": each.shortened, "cache": each.handle.report()["activation_cache"]}
            del runs, each
            gc.collect()
    return found


def figures(record: dict[str, Any]) -> dict[str, float]:
    """Figures relative to plain: steps that used the cache, and whole runs. Also the largest difference of losses.

    A step is compared with the plain step of the same number, which ran beside it. The figure is the median over steps,
    so that a machine that slows down in the course of a run changes nothing.
    """
    step_s = record["step_s"]
    kept = [place for place, is_short in enumerate(record["shortened"]) if is_short]
    first = int(record["device"]["name"] != "cpu")  # an accelerator loads its kernels in the first step
    total = {name: sum(times[first:]) / sum(step_s["plain"][first:]) for name, times in step_s.items()}
    losses = zip(record["losses"]["dropbp"], record["losses"]["dropbp, cached"], strict=True)

    def relative(name: str) -> float:
        return float(statistics.median(step_s[name][place] / step_s["plain"][place] for place in kept))

    return {
        "shortened_step": relative("dropbp, cached"),
        "uncached_step": relative("dropbp"),
        "run": total["dropbp, cached"],
        "uncached_run": total["dropbp"],
        "frozen_run": total["frozen"],
        "loss_difference": max(abs(one - other) for one, other in losses),
    }


class _Variant:
    """One variant: its model, its optimizer and its step times."""

    def __init__(self, name: str, sizes: Sizes, tuning: str, drop_rate: float, steps: int, device: Device) -> None:
        self.device = device
        self.model = _model(sizes, tuning, device)
        enable: dict[str, Enable] = {
            "plain": lambda model: None,
            "dropbp": functools.partial(dropbp.enable, drop_rate=drop_rate, steps=steps),
            "dropbp, cached": functools.partial(dropbp.enable, drop_rate=drop_rate, steps=steps, activation_cache=True),
            "frozen": functools.partial(dropbp.enable, drop_rate=drop_rate, rates="freeze"),
        }
        self.handle = enable[name](self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device.name == "cuda")
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.shortened: list[bool] = []

    def step(self, ids_BS: Tensor) -> None:
        before, begin_s = self._count(), self._now_s()
        loss = self.model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_s.append(self._now_s() - begin_s)
        self.losses.append(loss.item())
        self.shortened.append(self._count() > before)

    def _now_s(self) -> float:
        if self.device.name == "cpu":
            return time.process_time()
        self.device.synchronize()
        return time.perf_counter()

    def _count(self) -> int:
        cache = None if self.handle is None else self.handle.cache
        return 0 if cache is None else int(cache.forwards_hit)


def _model(sizes: Sizes, tuning: str, device: Device) -> Any:
    if "model" in sizes:
        named = build_model(sizes["model"], Training(tuning), device.name)
        for module in named.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the state of a row must be the same each time
        return named
    width = sizes["width"]
    heads = max(2, width // 64)
    model: Any = small_llama(
        sizes["layers"], width, vocab_size=sizes["vocabulary"], intermediate_size=width * 43 // 16,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip
    if tuning == "lora":
        model = with_lora(model, 0, lora_dropout=0.0)
    return model.to(device.name).train()


def _batches(rows_NS: Tensor, size: int) -> Iterator[Tensor]:
    for epoch in range(EPOCHS):
        order = torch.randperm(len(rows_NS), generator=torch.Generator().manual_seed(epoch))
        yield from rows_NS[order].split(size)
