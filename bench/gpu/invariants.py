"""Checks DropBP's promises about a step on the device itself, with the models that are measured there.

The forward is bit-identical to plain training's. Gradients equal those of a step whose dropped branches are detached.
Kernels that add in no fixed order differ between two runs as well, so the difference between two such steps is reported
beside it. Parameters of a dropped branch have no gradient. After the first steps nothing is compiled any more, whatever
the mask. And a step does not make the host wait for the device where a plain one does not.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dropbp
from dropbp.device import Device, get_device

from ..common import records
from ..common.models import build_model, check_packages
from ..common.options import add_run_arguments, check_only, device_name, prepare_run, progress
from ..common.presets import DROP_RATES, Training, chosen
from ..common.reference_detach import DetachedBranches
from ..common.setup import PLAIN, SAMPLERS, Lane, Variant, build_batch, compiler_of, loss_of, many_compilations, twin

KIND = "invariants"
WAIT = "called a synchronizing CUDA operation"  # text of PyTorch's warning
FROZEN_STEM = {"model.embed_tokens.weight"}  # the input embedding, in steps whose backward ends above it
Gradients = list[Tensor | None]


@dataclass(frozen=True)
class InvariantsPreset:
    """Runs of `invariants`: one for each training, all drop rates in it."""

    model: str
    trainings: tuple[Training, ...]
    drop_rates: tuple[float, ...] = DROP_RATES
    batch_size: int = 2
    sequence_length: int = 512
    masks: int = 20


_EAGER = (Training("full"), Training("lora"))
_COMPILED = tuple(Training(tuning, compiled=True) for tuning in ("full", "lora"))
PRESETS = {
    "llama2-7b": InvariantsPreset("llama2-7b", _EAGER),
    "llama2-7b-4-layers": InvariantsPreset("llama2-7b-4-layers", _COMPILED),
    "rehearsal": InvariantsPreset(
        "llama-4x64", (*_EAGER, *_COMPILED), (0.875,), batch_size=1, sequence_length=16, masks=6
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--preset", action="append", choices=tuple(PRESETS), help="what to run; may be repeated")
    parser.add_argument("--only", metavar="TRAINING", help="only this training of the preset, such as full-bf16")
    add_run_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the presets; returns 1 if an invariant does not hold."""
    prepare_run(args)
    names = args.preset or (("rehearsal",) if args.smoke or device_name(args) == "cpu" else ("llama2-7b",))
    presets = {name: chosen("preset", PRESETS, name) for name in names}
    check_only(args.only, (preset.trainings for preset in presets.values()))
    broken = 0
    for name, preset in presets.items():
        for training in preset.trainings:
            if args.only in (None, training.name):
                broken += not _check(name, preset, training, args)
    return 1 if broken else 0


def _check(name: str, preset: InvariantsPreset, training: Training, args: argparse.Namespace) -> bool:
    device = get_device(device_name(args))
    configuration = {
        **asdict(preset),
        "trainings": None,
        **training.configuration(),
        "device": device.name,
    }
    store, run_name = records.Store(args.output, KIND), f"{name}--{device.name}--{training.name}"
    done = None if args.again else store.finished(run_name, configuration)
    if done is not None:
        return all(held(figures) for figures in done["variants"].values())
    check_packages(training, device.name)
    variants = [Variant(how, rate) for how in SAMPLERS for rate in preset.drop_rates]
    with store.run(run_name, configuration, device, goes_on=True) as record, progress(len(variants), run_name) as bar:
        found: dict[str, Any] = record.setdefault("variants", {})
        check = _Compiled(preset, training, device) if training.compiled else _Eager(preset, training, device)
        for variant in variants:
            if variant.name not in found:
                found[variant.name] = check.figures(variant)
                store.save(record)
            bar.update()
    return all(held(figures) for figures in found.values())


def held(figures: dict[str, Any]) -> bool:
    """Whether a variant's figures are as promised; gradients may differ by as much as two runs of the same
    kernels do.
    """
    if "compiled_graphs_late" in figures:
        return bool(figures["compiled_graphs_late"] == 0)
    noise, waits, plain = figures["gradient_noise"], figures["waits"], figures["plain_waits"]
    return (
        figures["forward_equal"]
        and figures["dropped_without_gradient"]
        and set(figures["resting"]) <= FROZEN_STEM
        and figures["gradient_difference"] <= max(2 * noise, torch.finfo(torch.float32).eps)
        and (waits is None or waits <= plain)
    )


class _Eager:
    """Forward, gradients and waits of all variants over one set of parameters. No optimizer: gradients need
    its memory.
    """

    def __init__(self, preset: InvariantsPreset, training: Training, device: Device) -> None:
        self.device = device
        self.model = build_model(preset.model, training, device.name)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ids_BS = build_batch(preset.model, preset.batch_size, preset.sequence_length, device.name)

    def figures(self, variant: Variant) -> dict[str, Any]:
        """All figures of one variant."""
        plain_loss = self._seeded(lambda: loss_of(self.model, self.ids_BS).detach())
        lane = Lane(variant, self.model, self.device)
        with lane.masked(lane.peak_memory_masks(1)[-1]):  # for nested masks, the one that keeps the budget
            loss, gradients = self._step(lane.model)
        dropped = [digit == "1" for digit in lane.mask or ""]
        figures: dict[str, Any] = {
            "mask": lane.mask,
            "dropped_share": lane.dropped_share,
            "forward_equal": torch.equal(loss, plain_loss),
            "dropped_without_gradient": self._without_gradient(lane, dropped),
            "resting": self._resting(gradients, dropped),
            "gradient_difference": self._difference(gradients, dropped),
        }
        del gradients
        figures["gradient_noise"] = self._difference(self._detached_step(dropped), dropped)
        self._clear()
        plain = Lane(PLAIN, self.model, self.device)
        figures["waits"], figures["plain_waits"] = self._waits(lane), self._waits(plain)
        return figures

    def _step(self, model: nn.Module) -> tuple[Tensor, Gradients]:
        self._clear()
        loss = self._seeded(lambda: loss_of(model, self.ids_BS))
        if loss.requires_grad:  # not in the reference, if everything trainable is dropped
            loss.backward()
        return loss.detach(), [parameter.grad for parameter in self.trained]

    def _detached_step(self, dropped: Sequence[bool]) -> Gradients:
        model = twin(self.model)
        reference = DetachedBranches(model, 0.5)
        with reference.fixed(tuple(dropped)):
            return self._step(model)[1]

    def _seeded(self, work: Callable[[], Tensor]) -> Tensor:
        """Run with the same dropout each time."""
        torch.manual_seed(0)
        return work()

    def _clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def _without_gradient(self, lane: Lane, dropped: Sequence[bool]) -> bool:
        assert isinstance(lane.handle, dropbp.Handle)
        modules = [
            lane.model.get_submodule(name)
            for branch, is_dropped in zip(lane.handle.branches, dropped, strict=True)
            if is_dropped
            for name in branch.modules
        ]
        return all(parameter.grad is None for module in modules for parameter in module.parameters())

    def _resting(self, ours: Gradients, dropped: Sequence[bool]) -> list[str]:
        """Parameters outside the dropped branches that nevertheless have no gradient."""
        theirs = self._detached_step(dropped)
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        pairs = zip(names, ours, theirs, strict=True)
        return [name for name, mine, other in pairs if mine is None and other is not None]

    def _difference(self, ours: Gradients, dropped: Sequence[bool]) -> float:
        """The largest relative difference of a tensor's gradient to that with the dropped branches detached.

        Infinite if a dropped branch has a gradient. Compared tensor by tensor, so that at most two sets of gradients
        are held.
        """
        theirs = self._detached_step(dropped)
        worst = 0.0
        for mine, other in zip(ours, theirs, strict=True):
            if mine is not None and other is None:
                return math.inf
            if mine is not None and other is not None:
                size = float(other.float().norm())
                distance = float((mine.float() - other.float()).norm())
                worst = max(worst, distance / size if size else distance)
        return worst

    def _waits(self, lane: Lane) -> int | None:
        """How often a step makes the host wait for the device; None if PyTorch cannot tell."""
        if self.device.name != "cuda":
            return None
        for _ in range(2):  # the first steps may set something up
            loss_of(lane.model, self.ids_BS).backward()
            self._clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loss_of(lane.model, self.ids_BS).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        self._clear()
        return sum(WAIT in str(one.message) for one in said)


class _Compiled:
    """How many graphs the first steps compile, and how many further masks compile."""

    def __init__(self, preset: InvariantsPreset, training: Training, device: Device) -> None:
        self.preset, self.device = preset, device
        self.model = build_model(preset.model, training, device.name)
        self.ids_BS = build_batch(preset.model, preset.batch_size, preset.sequence_length, device.name)

    def figures(self, variant: Variant) -> dict[str, Any]:
        """All figures of one variant."""
        with many_compilations():
            lane = Lane(variant, self.model, self.device, compiled=True, backend=compiler_of(self.preset.model))
            assert isinstance(lane.handle, dropbp.Handle)
            count = len(lane.handle.branches)
            counts = [self.device.compile_count()]
            drawn: list[tuple[bool, ...] | None] = [None] * self.preset.masks
            for masks in ([*_kinds(count), *drawn], drawn):
                for mask in masks:
                    with lane.masked(mask):
                        loss_of(lane.model, self.ids_BS).backward()
                    self.model.zero_grad(set_to_none=True)
                counts.append(self.device.compile_count())
        first, warm, last = counts
        return {"compiled_graphs": warm - first, "compiled_graphs_late": last - warm, "masks": self.preset.masks}


def _kinds(count: int) -> list[tuple[bool, ...]]:
    """Masks in which every block has each combination of its two branches, with and without a gradient from below."""
    pairs = [(False, False), (True, False), (False, True), (True, True)]
    blocks = count // 2
    same = [tuple(pair * blocks) for pair in pairs]
    rising = [tuple(i < dropped for i in range(count)) for dropped in range(count + 1)]
    mixed = [tuple(drop for block in range(blocks) for drop in pairs[(block + turn) % 4]) for turn in range(4)]
    return [*same, *rising, *mixed]
