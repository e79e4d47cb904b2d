"""The largest batch or length that fits: counted on shapes, or tried on an accelerator until memory runs out.

The trial runs in a process of its own (`python -m dropbp.bench.memory.search`). It starts with a clean allocator, and
if it dies, that is a result.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dropbp.device import Device, known_bytes
from dropbp.errors import DropBPError
from dropbp.estimate.footprint import largest

from ..common.options import TimeLimit
from ..common.presets import Training
from ..common.processes import Worker, answer, requests
from ..common.setup import Variant
from .probe import TRIED_STEPS, Probe, Workplace, is_out_of_memory, release_memory

MOST_BATCH = 4096
GUESSES = 4
FAR = 16  # times a tried size; a guess beyond that is not trusted
ALLOCATOR_SHARE = 0.96  # of the device's memory, before fragmentation prevents a step
Found = dict[str, Any]


def largest_counted(
    probe: Probe, sized: Callable[[int], tuple[int, int]], budget_bytes: int, step: int, most: int
) -> tuple[int, list[dict[str, int]]]:
    """The largest size whose peak is within the budget, and the (size, peak) pairs counted around it.

    `sized` maps a size to a micro-batch and a length. Memory is nearly linear in the size, so a few sizes with one mask
    locate the border roughly. Bisection with all masks then finds it exactly.
    """
    asked: dict[int, int] = {}

    def fits(size: int) -> bool:
        asked[size] = probe.peak_bytes(*sized(size), enough_bytes=budget_bytes)
        return asked[size] <= budget_bytes

    guess = guess_border(lambda size: probe.rough_peak_bytes(*sized(size)), budget_bytes, step, most)
    size = largest(fits, step=step, most=most, guess=guess)
    return size, [{"size": size, "peak_bytes": asked[size]} for size in sorted(asked)]


def guess_border(peak: Callable[[int], int], budget_bytes: int, step: int, most: int) -> int:
    """Estimate the largest size whose peak is within the budget, by secants, until they move by at most one step."""
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


@dataclass(frozen=True)
class Search:
    """The quantity that grows until memory runs out: the micro-batch, or the sequence length.

    Attributes:
        model: its name.
        grows: `batch_size` or `length`, as in records.
        fixed: value of the other one.
        step: only multiples of this are tried.
        most: the largest size to try.
        accumulated: whether the gradients of all parameters exist from the start.
        masks: number of random masks counted.
    """

    model: str
    grows: str
    fixed: int
    step: int = 1
    most: int = MOST_BATCH
    accumulated: bool = False
    masks: int = TRIED_STEPS

    def every(
        self,
        found: dict[str, Found],
        variants: Sequence[Variant],
        training: Training,
        device: str,
        limit: TimeLimit,
        save: Callable[[], None],
        counted: tuple[Workplace, int] | None = None,
    ) -> Iterator[str]:
        """Find the largest size of each variant. Earlier measurements are reused.

        Yields a line of text for each variant done.

        Args:
            found: size and trials by name of the variant; filled in.
            variants: they share the remaining time.
            training: how they are trained.
            device: the device's name.
            limit: the time limit.
            save: called after each new finding.
            counted: where to count, and the bytes available; None tries it on the device.
        """
        for index, variant in enumerate(variants):
            known = found.get(variant.name, {}).get("asked", [])

            def note(size: int, asked: list[Found], name: str = variant.name) -> None:
                found[name] = {self.grows: size, "asked": [*asked, {"ended_after_s": None}]}
                save()

            if not known or not is_border(known):
                seconds = limit.left_s() / (len(variants) - index)
                size, asked = (
                    self._counted(variant, *counted)
                    if counted is not None
                    else tried_in_a_process(self.model, training, variant, device, self._task(), seconds, known, note)
                )
                found[variant.name] = {self.grows: size, "asked": asked}
                save()
            yield variant.name

    def _counted(self, variant: Variant, place: Workplace, budget_bytes: int) -> tuple[int, list[Found]]:
        probe = Probe(place, variant, accumulated=self.accumulated, masks=self.masks)
        return largest_counted(probe, self._sized, budget_bytes, self.step, self.most)

    def _sized(self, size: int) -> tuple[int, int]:
        return (size, self.fixed) if self.grows == "batch_size" else (self.fixed, size)

    def _task(self) -> Found:
        vary = "batch_size" if self.grows == "batch_size" else "sequence_length"
        return {
            "vary": vary, "fixed": self.fixed, "step": self.step, "most": self.most, "accumulated": self.accumulated
        }  # fmt: skip


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
    """The largest size that trains, tried in a process of its own, and all sizes tried.

    If the process dies, or is ended at its time limit, the answer is the largest size it had reported to fit. The last
    entry then says how it ended, and the size is not a border (`is_border`).

    Args:
        model: its name.
        training: how it is trained.
        variant: plain, or with branches dropped.
        device: the device's name.
        task: what is varied, in which steps, up to which size.
        seconds: time limit.
        known: results of an earlier search, which are not tried again.
        note: called after each try with the largest size so far and all entries.

    Raises:
        DropBPError: no size could be tried; the message gives the reason.
    """
    release_memory()
    asked = [entry for entry in known if "fits" in entry]
    request = {"model": model, "training": asdict(training), "variant": asdict(variant), "device": device, **task}
    until_s, error = time.monotonic() + seconds, None
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with tempfile.TemporaryFile("w+") as errors, Worker("dropbp.bench.memory.search", environment, errors) as process:
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
    """Whether the search finished, so that no larger size fits. Otherwise its time ran out, or its process died."""
    return not any("ended_after_s" in entry or "died" in entry for entry in asked)


def main() -> None:
    """The process: reads a request from standard input; writes one JSON line per size, and a last one at the end."""
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
        answer({"size": 0, "fits": False}, sys.stdout)  # not even the model and its optimizer fit
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
    """An estimate of the border from an earlier search; None if that found no size that fits."""
    fitting = _fitting(known)
    beyond = min((entry["size"] for entry in known if not entry["fits"]), default=fitting)
    return (fitting + beyond) // 2 or None


def guess_tried(device: Device, fits: Callable[[int], bool], step: int, most: int) -> int | None:
    """Estimate the largest size that trains from the device memory that smaller sizes use; None if they do not show it.

    Two small trials predict the memory of a larger size. If the optimizer step dominates both, they predict little
    about a much larger size, so a larger one is tried. On CPU the measured memory is that of the whole process, which
    says little about a step; other devices may report none.
    """
    if device.name == "cpu" or None in (device.max_memory_allocated_bytes(), device.memory_limit_bytes()):
        return None
    usable_bytes = ALLOCATOR_SHARE * known_bytes(device.memory_limit_bytes(), device)

    def peak(size: int) -> int | None:
        device.reset_peak_memory()
        return known_bytes(device.max_memory_allocated_bytes(), device) if fits(size) else None

    small, large = step, min(4 * step, most)
    low, high = peak(small), peak(large)
    while low is not None and high is not None and large > small:
        slope = (high - low) / (large - small)
        guess = most if slope <= 0 else min(int(small + (usable_bytes - low) / slope) // step * step, most)
        if guess <= FAR * large:
            return max(guess, step)
        small, low, large = large, high, min(FAR * large, most)
        high = peak(large)
    return None if low is None or small == step else (small + large) // 2 // step * step


if __name__ == "__main__":
    main()
