"""How much memory a training step needs, and the largest batch or length that fits.

Counted: the step runs on the meta device, where only shapes are worked out, and the bytes of its tensors are counted.
That is exact and the same everywhere, and leaves out what an allocator adds. Tried: on an accelerator the step is run
until memory is out, in a process of its own (`python -m dropbp.bench.memory.probe`), which starts with a clean
allocator and whose death is a result and no accident.

Optimizer states are there from the start, and with `accumulated` the gradients of all parameters, as when those of
several micro-batches are summed: what DropBP spares there is activations alone.
"""

from __future__ import annotations

import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

import dropbp
from dropbp.device import Device, get_device, known_bytes
from dropbp.errors import DropBPError
from dropbp.memory import track_tensor_bytes

from ..common.models import build_model
from ..common.presets import ThroughputPreset, Training
from ..common.processes import Worker, answer, requests
from ..common.setup import Lane, Variant, build_batch, build_optimizer, loss_of
from .bisection import largest

MOST_BATCH = 4096
TRIED_STEPS = 3
GUESSES = 4
ALLOCATOR_SHARE = 0.96  # of a device's memory, before it is too fragmented to serve a step
Found = dict[str, Any]
Mask = tuple[bool, ...] | None  # None: drawn by the model


class Workplace:
    """A model and its optimizer, for one variant after another: weights, gradients and states are the same for all."""

    def __init__(self, model: str, training: Training, device: str = "meta") -> None:
        self.model_name, self.device = model, get_device(device)
        self.model = build_model(model, training, device)
        self.optimizer = build_optimizer(self.model, training.tuning)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._update_bytes: dict[tuple[bool, ...], int] = {}
        self.give_gradients(True)
        self.optimizer.step()  # makes its states

    def give_gradients(self, given: bool) -> None:
        """Gradients for all that is trained, or none. Of ones, as those of zeros count as none and are let go of."""
        for parameter in self.trained:
            parameter.grad = torch.ones_like(parameter) if given else None

    def update_bytes(self) -> int:
        """What a step of the optimizer needs for itself at its peak, with the gradients there are. On the meta device.

        It depends on which parameters have one and on nothing else, so it is counted once for each such set.
        """
        given = tuple(parameter.grad is not None for parameter in self.trained)
        if given not in self._update_bytes:
            with track_tensor_bytes(self.model, self.optimizer) as tracked:
                before_bytes = tracked.live_bytes
                self.optimizer.step()
            self._update_bytes[given] = tracked.peak_bytes - before_bytes
        return self._update_bytes[given]


class Probe:
    """One variant of a training; its memory can be asked for at any size of the input.

    `peak_bytes` and `fits` change the gradients of the workplace: its probes take turns.
    """

    def __init__(
        self, place: Workplace, variant: Variant, *, accumulated: bool = True, masks: int = TRIED_STEPS
    ) -> None:
        self.place, self.accumulated, self.masks = place, accumulated, masks
        self.lane = Lane(variant, place.model, place.device)
        self._start = self.lane.handle.state_dict() if isinstance(self.lane.handle, dropbp.Handle) else None
        self._peak_memory_first: list[Mask] | None = None

    def peak_bytes(self, batch_size: int, sequence_length: int, enough_bytes: float = math.inf) -> int:
        """The most tensor bytes of the steps with the peak_memory_masks masks, counted. On the meta device.

        Masks are left out once one needs more than `enough_bytes`; the answer is then above that, and may be too small.
        """
        peak = 0
        for mask in self._masks(batch_size, sequence_length):
            peak = max(peak, self._peak_with(mask, batch_size, sequence_length))
            if peak > enough_bytes:
                break
        return peak

    def rough_peak_bytes(self, batch_size: int, sequence_length: int) -> int:
        """The same with one mask, the peak_memory_masks at the first size that was asked about."""
        return self._peak_with(self._masks(batch_size, sequence_length)[0], batch_size, sequence_length)

    def _masks(self, batch_size: int, sequence_length: int) -> list[Mask]:
        """Those of all sizes, the peak_memory_masks at the first size in front."""
        if self._peak_memory_first is None:
            self._rewind()
            peaks = []
            for mask in self.lane.greedy_masks(self.masks):
                peak = self._peak_with(mask, batch_size, sequence_length)
                drawn = self.lane.handle.mask if mask is None and self.lane.handle is not None else mask
                peaks.append((peak, drawn))
            self._peak_memory_first = [mask for _, mask in sorted(peaks, key=lambda pair: -pair[0])]
        return self._peak_memory_first

    def _peak_with(self, mask: Mask, batch_size: int, sequence_length: int) -> int:
        place, ids_BS = self.place, self._batch(batch_size, sequence_length)
        place.give_gradients(self.accumulated)
        with self.lane.masked(mask), track_tensor_bytes(self.lane.model, place.optimizer, ids_BS) as tracked:
            loss_of(self.lane.model, ids_BS).backward()
        return max(tracked.peak_bytes, tracked.live_bytes + place.update_bytes())

    def fits(self, batch_size: int, sequence_length: int) -> bool:
        """Whether steps with the peak_memory_masks masks run through. On an accelerator."""
        place, ids_BS = self.place, self._batch(batch_size, sequence_length)
        self._rewind()
        try:
            for mask in self.lane.greedy_masks(self.masks):
                place.give_gradients(self.accumulated)
                with self.lane.masked(mask):
                    loss_of(self.lane.model, ids_BS).backward()
                    place.optimizer.step()
            place.device.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            place.optimizer.zero_grad(set_to_none=True)
            release_memory()
        return True

    def _batch(self, batch_size: int, sequence_length: int) -> torch.Tensor:
        return build_batch(self.place.model_name, batch_size, sequence_length, self.place.device.name)

    def _rewind(self) -> None:
        """The same masks for every size."""
        if isinstance(self.lane.handle, dropbp.Handle) and self._start is not None:
            self.lane.handle.load_state_dict(self._start)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory is what was missing; some devices say so in the message alone."""
    words = ("out of memory", "allocation failed", "oom")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def largest_counted(
    probe: Probe, sized: Callable[[int], tuple[int, int]], budget_bytes: int, step: int, most: int
) -> tuple[int, list[dict[str, int]]]:
    """The largest size whose peak is within the budget, and what was counted around it: size and peak.

    `sized` makes a micro-batch and a length of a size. Memory is nearly linear in it, so a few sizes with one mask tell
    about where the border is; bisection with all masks finds it.
    """
    asked: dict[int, int] = {}

    def fits(size: int) -> bool:
        asked[size] = probe.peak_bytes(*sized(size), enough_bytes=budget_bytes)
        return asked[size] <= budget_bytes

    guess = guess_border(lambda size: probe.rough_peak_bytes(*sized(size)), budget_bytes, step, most)
    size = largest(fits, step=step, most=most, guess=guess)
    return size, [{"size": size, "peak_bytes": asked[size]} for size in sorted(asked)]


def guess_border(peak: Callable[[int], int], budget_bytes: int, step: int, most: int) -> int:
    """About the largest size whose peak is within the budget: by secants, until they move no more than a step."""
    small, large = step, min(4 * step, most)
    known = {size: peak(size) for size in (small, large)}
    for _ in range(GUESSES):
        slope = (known[large] - known[small]) / (large - small) if large != small else 0
        if slope <= 0:
            return step
        guess = int(small + (budget_bytes - known[small]) / slope) // step * step
        guess = min(max(guess, step), most)
        if abs(guess - large) <= step:
            return guess
        small, large = large, guess
        if guess not in known:
            known[guess] = peak(guess)
    return large


def largest_batch(preset: ThroughputPreset, place: Workplace, variant: Variant, budget_bytes: int) -> Found:
    """The largest micro-batch of a preset's length whose step is within the budget, counted on shapes."""
    probe = Probe(place, variant, accumulated=False)
    size, asked = largest_counted(probe, lambda size: (size, preset.sequence_length), budget_bytes, 1, MOST_BATCH)
    return {"batch_size": size, "asked": asked}


def largest_batch_tried(
    preset: ThroughputPreset,
    training: Training,
    variant: Variant,
    device: str,
    seconds: float,
    known: Sequence[Found] = (),
    note: Callable[[Found], None] | None = None,
) -> Found:
    """The largest micro-batch of a preset's length that trains on an accelerator, of those tried in so long."""
    task = {"vary": "batch_size", "fixed": preset.sequence_length, "step": 1, "most": MOST_BATCH, "accumulated": False}

    def found(size: int, asked: list[Found]) -> Found:
        return {"batch_size": size, "asked": asked}

    noted = None if note is None else lambda size, asked: note(found(size, asked))
    return found(*tried_in_a_process(preset.model, training, variant, device, task, seconds, known, noted))


def tried_in_a_process(
    model: str,
    training: Training,
    variant: Variant,
    device: str,
    task: dict[str, Any],
    seconds: float = math.inf,
    known: Sequence[Found] = (),
    note: Callable[[int, list[Found]], None] | None = None,
) -> tuple[int, list[Found]]:
    """The largest size that trains, tried in a process of its own, and all that were tried.

    If the process dies, or is ended when its seconds are over, the answer is the largest size of which it had said that
    it fits, and the last entry says how it ended: that size is then no border (`is_border`).

    Args:
        model: its name.
        training: how it is trained.
        variant: plain, or with branches dropped.
        device: the device's name.
        task: what is varied, in which steps, up to which size.
        seconds: how long may be tried.
        known: what an earlier search found, which is not tried again.
        note: called with the largest size so far and all entries, after each try.

    Raises:
        DropBPError: nothing could be tried, for this reason.
    """
    release_memory()
    asked = [entry for entry in known if "fits" in entry]
    request = {"model": model, "training": asdict(training), "variant": asdict(variant), "device": device, **task}
    until_s, error = time.monotonic() + seconds, None
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with tempfile.TemporaryFile("w+") as errors, Worker("dropbp.bench.memory.probe", environment, errors) as process:
        process.ask({**request, "known": asked})
        try:
            for line in process.answers(until_s):
                if line is None:
                    errors.seek(0)
                    asked.append({"died": process.end(), "message": errors.read().strip().splitlines()[-1:]})
                elif "fits" not in line:
                    error = line.get("error")
                    break
                else:
                    asked.append(line)
                    if note is not None:
                        note(_fitting(asked), asked)
        except TimeoutError:
            asked.append({"ended_after_s": seconds})
    if error is not None:
        raise DropBPError(error)
    return _fitting(asked), asked


def _fitting(asked: Sequence[Found]) -> int:
    return max((entry["size"] for entry in asked if entry.get("fits")), default=0)


def is_border(asked: Sequence[Found]) -> bool:
    """Whether a search went on to its end: then no larger size fits. Else its time was over, or its process died."""
    return not any("ended_after_s" in entry or "died" in entry for entry in asked)


def release_memory() -> None:
    """Give back what earlier runs of this process left in its allocator, so that the other process has all of it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main() -> None:
    """The process: a request on standard input, one JSON line for each size that was tried, and one for the end."""
    request = next(requests())
    try:
        _search(request)
    except DropBPError as error:
        answer({"error": str(error)}, sys.stdout)
    else:
        answer({"error": None}, sys.stdout)


def _search(request: dict[str, Any]) -> None:
    known = {entry["size"]: bool(entry["fits"]) for entry in request["known"]}
    training, variant = Training(**request["training"]), Variant(**request["variant"])
    try:
        place = Workplace(request["model"], training, request["device"])
        probe = Probe(place, variant, accumulated=request["accumulated"])
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        answer({"size": 0, "fits": False}, sys.stdout)  # not even the model and its optimizer
        return

    def fits(size: int) -> bool:
        if size not in known:
            batch_size, length = (
                (size, request["fixed"]) if request["vary"] == "batch_size" else (request["fixed"], size)
            )
            known[size] = probe.fits(batch_size, length)
            answer({"size": size, "fits": known[size]}, sys.stdout)
        return known[size]

    step, most = request["step"], request["most"]
    guess = _guess_from(request["known"]) or guess_tried(place.device, fits, step, most)
    largest(fits, step=step, most=most, guess=guess)


def _guess_from(known: Sequence[Found]) -> int | None:
    """About the border, where an earlier search left off; None if it found nothing that fits."""
    fitting = _fitting(known)
    beyond = min((entry["size"] for entry in known if not entry["fits"]), default=fitting)
    return (fitting + beyond) // 2 or None


def guess_tried(device: Device, fits: Callable[[int], bool], step: int, most: int) -> int | None:
    """About the largest size that trains, from what two small ones take of the device; None if they tell nothing.

    On CPU memory is what the whole process holds, which says little about a step; other devices may not say anything.
    """
    if device.name == "cpu" or None in (device.max_memory_allocated_bytes(), device.memory_limit_bytes()):
        return None
    peaks: list[int] = []
    for size in (step, min(4 * step, most)):
        device.reset_peak_memory()
        if not fits(size):
            return None
        peaks.append(known_bytes(device.max_memory_allocated_bytes(), device))
    slope = (peaks[1] - peaks[0]) / (3 * step)
    if slope <= 0:
        return None
    usable_bytes = ALLOCATOR_SHARE * known_bytes(device.memory_limit_bytes(), device)
    return min(max(int(step + (usable_bytes - peaks[0]) / slope) // step * step, step), most)


if __name__ == "__main__":
    main()
