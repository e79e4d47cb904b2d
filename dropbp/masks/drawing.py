"""The mask of each training forward: fixed, kept from the last one, rehearsed, or drawn from rates and coupling.

The order of precedence is that of the methods: what a `with handle.fixed(mask)` says, nothing dropped during the
warm-up, the present mask as long as `resample` keeps it, the rehearsal of a lazy device, a new draw.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from dropbp.checks import checked_mask
from dropbp.config import Config
from dropbp.errors import ConfigError
from dropbp.flops import Shape
from dropbp.lazy.warmup import LOOKAHEAD, Rehearsal
from dropbp.masks.books import Mask
from dropbp.masks.samplers import Sampler

MAX_SAMPLERS = 32
_DIGITS = b"01" + bytes(254)  # of the bytes 0 and 1


class Drawing:
    """Draws masks for one model.

    Args:
        config: coupling, seed, warm-up and how long a mask is kept.
        rates: of the branches; set anew by `set_rates`, for all shapes, and by `see`.
        shape, flops: of the forwards to come; set anew by `see`.
    """

    def __init__(self, config: Config, rates: tuple[float, ...], shape: Shape, flops: Sequence[int]) -> None:
        self.config = config
        self.draws = 0
        self.current: Mask | None = None
        self.rehearsal: Rehearsal | None = None
        self.taken_ahead: Counter[Mask] = Counter()
        self._fixed = _FixedMasks()
        self._samplers: dict[Shape, Sampler] = {}
        self.see(shape, flops, rates)
        self.sampler()  # what is wrong with the coupling's options is said here, not in the first step

    @property
    def fixed(self) -> list[Mask]:
        """The masks of the `with handle.fixed(...)` open in this thread, the innermost last."""
        return self._fixed.masks

    def see(self, shape: Shape, flops: Sequence[int], rates: tuple[float, ...]) -> None:
        """The next forwards have this shape, and so the branches these FLOPs, and the rates that go with it."""
        self._shape, self._flops, self.rates = shape, flops, rates

    def set_rates(self, rates: tuple[float, ...]) -> None:
        """The next mask is drawn from these rates."""
        self.rates = rates
        self._samplers.clear()

    def resample(self) -> None:
        """The next mask is a new one."""
        self.current = None

    def next(self, forwards: int, with_gradient: Callable[[], int]) -> Mask:
        """The mask of the next training forward, True = backward dropped.

        Args:
            forwards: training forwards so far.
            with_gradient: tells which branches' parameters have gradients now, as bits; asked by a rehearsal only.
        """
        if self.rehearsal is None or self.rehearsal.done:
            return self._next(forwards, 0)
        held = with_gradient()
        mask = self._next(forwards, held)
        if not self.rehearsal.done:
            self.rehearsal.note(bits(mask), held)
        return mask

    def _next(self, forwards: int, with_gradient: int) -> Mask:
        if self.fixed:
            return self.fixed[-1]
        if forwards < self.config.warmup:
            return (False,) * len(self.rates)
        if self.current is None or not self._keeps(forwards):
            self.current = self._rehearsed(with_gradient) or self._drawn()
        return self.current

    def checked(self, mask: Sequence[bool]) -> Mask:
        """The mask as a tuple of bools. Raises ConfigError if it has not one entry per branch."""
        checked = checked_mask(mask)
        if len(checked) != len(self.rates):
            raise ConfigError(
                f"The mask has {len(checked)} entries, the model {len(self.rates)} branches. Give one bool per entry "
                "of handle.branches, True to drop its backward."
            )
        return checked

    def _keeps(self, forwards: int) -> bool:
        every = self.config.resample
        if isinstance(every, int):
            return (forwards - self.config.warmup) % every != 0
        return every == "step"

    def _drawn(self) -> Mask:
        """The next of the sequence; what a rehearsal took out of it is passed over when its turn comes."""
        while True:
            mask = self.sampler().draw(self.draws)
            self.draws += 1
            if not self.taken_ahead[mask]:
                return mask
            self.taken_ahead[mask] -= 1

    def _rehearsed(self, with_gradient: int) -> Mask | None:
        """A mask for a graph that is not compiled yet: see `dropbp.lazy.warmup`."""
        if self.rehearsal is None or self.rehearsal.done:
            return None
        dropped = self.rehearsal.next(with_gradient, self._upcoming)
        if dropped is None:
            return None
        mask = tuple(bool(dropped >> i & 1) for i in range(len(self.rates)))
        if self.config.recedes:  # the sequence has an end, by which the budget is met
            self.taken_ahead[mask] += 1
        return mask

    def _upcoming(self) -> list[int]:
        sampler = self.sampler()
        upcoming = [sampler.draw(draw) for draw in range(self.draws, self.draws + LOOKAHEAD)]
        if self.config.recedes:  # some masks come late, but they come
            upcoming += sampler.distinct_masks or ()
        return [bits(mask) for mask in upcoming]

    def sampler(self) -> Sampler:
        """Of the present shape: with other lengths the branches weigh differently."""
        if self._shape not in self._samplers:
            if len(self._samplers) >= MAX_SAMPLERS:
                self._samplers.clear()
            config = self.config
            self._samplers[self._shape] = Sampler(
                config.masks, self.rates, self._flops, config.seed, **config.coupling_options
            )
        return self._samplers[self._shape]


def bits(mask: Mask) -> int:
    """A mask as a number: bit i for branch i."""
    return int(b"0" + bytes(mask)[::-1].translate(_DIGITS), 2)


class _FixedMasks(threading.local):
    def __init__(self) -> None:
        self.masks: list[Mask] = []
