"""How much memory a training step needs, and the largest batch or length that fits.

Counted: the step runs on the meta device, where only shapes are worked out, and the bytes of its tensors are counted.
That is exact and the same everywhere, and leaves out what an allocator adds. Tried: on an accelerator the step is run
until memory is out, in a process of its own (`python -m dropbp.bench.probe`), which starts with a clean allocator and
whose death is a result and no accident.

Optimizer states are there from the start, and with `accumulated` the gradients of all parameters, as when those of
several micro-batches are summed: what DropBP spares there is activations alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import dropbp
from dropbp.device import get_device
from dropbp.memory import track_tensor_bytes

from .bisection import largest
from .presets import ThroughputPreset, Training
from .setup import Lane, Variant, build_batch, build_model, build_optimizer, loss_of

MOST_BATCH = 4096
TRIED_STEPS = 3
GUESSES = 4
Found = dict[str, Any]


class Probe:
    """One variant of a training; its memory can be asked for at any size of the input."""

    def __init__(
        self,
        model: str,
        training: Training,
        variant: Variant,
        device: str = "meta",
        accumulated: bool = True,
        masks: int = TRIED_STEPS,
    ) -> None:
        self.model_name, self.accumulated, self.masks, self.device = model, accumulated, masks, get_device(device)
        self.lane = Lane(variant, build_model(model, training, device), self.device)
        self.optimizer = build_optimizer(self.lane.model, training.tuning)
        self._start = self.lane.handle.state_dict() if isinstance(self.lane.handle, dropbp.Handle) else None
        self._give_gradients(True)
        self.optimizer.step()  # makes its states

    def peak_bytes(self, batch_size: int, sequence_length: int) -> int:
        """The most tensor bytes of the steps with the greediest masks, counted. On the meta device."""
        ids_BS = build_batch(self.model_name, batch_size, sequence_length, self.device.name)
        self._rewind()
        peaks = []
        for mask in self.lane.greedy_masks(self.masks):
            self._give_gradients(self.accumulated)
            with self.lane.masked(mask), track_tensor_bytes(self.lane.model, self.optimizer, ids_BS) as tracked:
                self._step(ids_BS)
            peaks.append(tracked.peak_bytes)
        return max(peaks)

    def fits(self, batch_size: int, sequence_length: int) -> bool:
        """Whether steps with the greediest masks run through. On an accelerator."""
        ids_BS = build_batch(self.model_name, batch_size, sequence_length, self.device.name)
        self._rewind()
        try:
            for mask in self.lane.greedy_masks(self.masks):
                self._give_gradients(self.accumulated)
                with self.lane.masked(mask):
                    self._step(ids_BS)
            self.device.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.name == "cuda":
                torch.cuda.empty_cache()
        return True

    def _step(self, ids_BS: torch.Tensor) -> None:
        loss_of(self.lane.model, ids_BS).backward()
        self.optimizer.step()

    def _rewind(self) -> None:
        """The same masks for every size."""
        if isinstance(self.lane.handle, dropbp.Handle) and self._start is not None:
            self.lane.handle.load_state_dict(self._start)

    def _give_gradients(self, given: bool) -> None:
        for parameter in self.lane.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter) if given else None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory is what was missing; some devices say so in the message alone."""
    words = ("out of memory", "allocation failed", "oom")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def largest_counted(
    peak_bytes: Callable[[int], int], budget_bytes: int, step: int, most: int
) -> tuple[int, list[dict[str, int]]]:
    """The largest size whose peak is within the budget, and everything that was asked: size and peak.

    Memory is nearly linear in the size, so two sizes tell about where the border is; bisection finds it.
    """
    asked: dict[int, int] = {}

    def peak(size: int) -> int:
        if size not in asked:
            asked[size] = peak_bytes(size)
        return asked[size]

    guess = _guess(peak, budget_bytes, step, most)
    size = largest(lambda size: peak(size) <= budget_bytes, step=step, most=most, guess=guess)
    return size, [{"size": size, "peak_bytes": asked[size]} for size in sorted(asked)]


def _guess(peak: Callable[[int], int], budget_bytes: int, step: int, most: int) -> int:
    """By secants, until the guess moves no more than a step."""
    small, large = step, min(4 * step, most)
    for _ in range(GUESSES):
        slope = (peak(large) - peak(small)) / (large - small) if large != small else 0
        if slope <= 0:
            return step
        guess = int(small + (budget_bytes - peak(small)) / slope) // step * step
        guess = min(max(guess, step), most)
        if abs(guess - large) <= step:
            return guess
        small, large = large, guess
    return large


def largest_batch(
    preset: ThroughputPreset, training: Training, variant: Variant, device: str, budget_bytes: int
) -> Found:
    """The largest micro-batch of a preset's length: counted against a budget on CPU, tried elsewhere."""
    if device == "cpu":
        probe = Probe(preset.model, training, variant, accumulated=False)
        size, asked = largest_counted(
            lambda size: probe.peak_bytes(size, preset.sequence_length), budget_bytes, 1, MOST_BATCH
        )
        return {"batch_size": size, "asked": asked}
    task = {"vary": "batch_size", "fixed": preset.sequence_length, "step": 1, "most": MOST_BATCH, "accumulated": False}
    size, asked = tried_in_a_process(preset.model, training, variant, device, task)
    return {"batch_size": size, "asked": asked}


def tried_in_a_process(
    model: str, training: Training, variant: Variant, device: str, task: dict[str, Any]
) -> tuple[int, list[dict[str, Any]]]:
    """The largest size that trains, tried in a process of its own, and all that were tried.

    If the process dies the answer is the largest size of which it had said that it fits, and the last entry says how
    it died.
    """
    request = {"model": model, "training": asdict(training), "variant": asdict(variant), "device": device, **task}
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(
        [sys.executable, "-m", "dropbp.bench.probe"],
        input=json.dumps(request), env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    asked = [line for line in lines if "fits" in line]
    fitting = max((line["size"] for line in asked if line["fits"]), default=0)
    if done.returncode:
        asked.append({"died": done.returncode, "message": done.stderr.strip().splitlines()[-1:]})
    return fitting, asked


def main() -> None:
    """The process: a request on standard input, one JSON line for each size that was tried."""
    request = json.load(sys.stdin)
    training, variant = Training(**request["training"]), Variant(**request["variant"])
    probe = Probe(request["model"], training, variant, request["device"], request["accumulated"])

    def fits(size: int) -> bool:
        batch_size, length = (size, request["fixed"]) if request["vary"] == "batch_size" else (request["fixed"], size)
        answer = probe.fits(batch_size, length)
        sys.stdout.write(json.dumps({"size": size, "fits": answer}) + "\n")
        sys.stdout.flush()
        return answer

    largest(fits, step=request["step"], most=request["most"])


if __name__ == "__main__":
    main()
