"""Where a trainer is, how long its steps take, and when masks are drawn and rates are calibrated."""

from __future__ import annotations

import time
from typing import Any

from dropbp.errors import ConfigError
from dropbp.masks.registry import sampler_kind

RESAMPLE = ("forward", "step")


class Position:
    """Where a trainer is: its optimizer step, and the micro-batch in that step.

    An epoch has `epoch` micro-batches (None: unknown); its last step has the remainder.
    """

    def __init__(self, max_steps: int, accumulation: int, epoch: int | None) -> None:
        self.max_steps, self.accumulation = max(1, max_steps), accumulation
        self.epoch = epoch or accumulation
        self.steps = -(-self.epoch // accumulation)
        self.step = self.done = 0

    def begin_step(self, step: int) -> None:
        self.step, self.done = step, 0

    def end_micro_batch(self) -> None:
        self.done += 1

    def draws(self, resample: str, steps: int | None = None) -> int:
        """Masks drawn in this many optimizer steps (None: in all), if the model runs once for each micro-batch."""
        count = self.max_steps if steps is None else steps
        if resample == "step":
            return count
        epochs, rest = divmod(count, self.steps)
        return epochs * self.epoch + min(rest * self.accumulation, self.epoch)

    def share_after(self, warmup: int) -> float:
        """The finished share of the steps after a warm-up; negative during the warm-up."""
        last = self.step % self.steps == self.steps - 1
        expected = self.epoch - self.accumulation * (self.steps - 1) if last else self.accumulation
        done = self.step + min(self.done / expected, 1.0) - warmup
        return min(done / max(1, self.max_steps - warmup), 1.0)


class StepClock:
    """Mean step time since the last query."""

    def __init__(self) -> None:
        self._begin_s: float | None = None
        self._total_s = 0.0
        self._steps = 0
        self._mean_s = 0.0

    def begin(self) -> None:
        self._begin_s = time.perf_counter()

    def end(self) -> None:
        if self._begin_s is not None:
            self._total_s += time.perf_counter() - self._begin_s
            self._steps += 1

    def mean_s(self) -> float:
        if self._steps:
            self._mean_s = self._total_s / self._steps
        self._total_s, self._steps = 0.0, 0
        return self._mean_s


def check_schedule(resample: Any, calibrate_at: Any, recalibrate_every: Any, warmup_steps: Any) -> None:
    """Raises ConfigError for values that are not allowed."""
    if resample not in RESAMPLE:
        raise ConfigError(f"resample={resample!r} is not known; allowed are {' and '.join(map(repr, RESAMPLE))}.")
    for name, value in (("calibrate_at", calibrate_at), ("recalibrate_every", recalibrate_every)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < float("inf")):
            raise ConfigError(f"{name}={value!r} must be above 0: a share of training below 1, or a step; None is off.")
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ConfigError(f"warmup_steps={warmup_steps!r} must be 0 or more: a number of optimizer steps.")


def calibration_point(calibrate_at: float | int | str | None, masks: str) -> float | int | None:
    """When to calibrate first; `auto` leaves it to the mask sampler. Raises ConfigError for other strings."""
    if not isinstance(calibrate_at, str):
        return calibrate_at
    if calibrate_at != "auto":
        raise ConfigError(f"calibrate_at={calibrate_at!r} must be 'auto', a share of training, a step, or None.")
    return None if sampler_kind(masks).prefixes else 0.1


def length_of(loader: Any) -> int | None:
    """Micro-batches of an epoch; None if the loader does not tell."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def as_steps(amount: float | int, max_steps: int) -> int:
    """A share of the training, or a number of steps, as optimizer steps."""
    return max(1, round(amount * max_steps)) if amount < 1 else int(amount)
