"""Drop rates that follow from FLOPs alone: a profile over depth, worked out for each shape that is seen."""

from __future__ import annotations

from collections.abc import Sequence

from dropbp.config import Config
from dropbp.flops import Shape
from dropbp.masks.rates import depth_rates

MAX_SHAPES = 32  # whose rates are remembered


class Profile:
    """The rates of a configuration that names a profile instead of giving rates.

    Attributes:
        name: of the profile in `dropbp.masks.rates.depth_rates`; `uniform` where all rates are the same.
    """

    def __init__(self, config: Config, name: str) -> None:
        self.config, self.name = config, name
        self._made: dict[Shape, tuple[float, ...]] = {}

    @classmethod
    def of(cls, config: Config) -> Profile | None:
        """None where the rates were given."""
        if not isinstance(config.rates, str):
            return None
        nested = "band" if config.recedes else "shelf"
        auto = nested if config.masks == "nested" else "uniform"
        return cls(config, auto if config.rates == "auto" else config.rates)

    def rates(self, shape: Shape, flops: Sequence[int]) -> tuple[float, ...]:
        """Of the branches at a shape, where they have these FLOPs: attention weighs more in long sequences."""
        if self.name == "uniform":
            return (float(self.config.drop_rate),) * len(flops)
        if shape not in self._made:
            if len(self._made) >= MAX_SHAPES:
                self._made.clear()
            cap = 1.0 if self.config.max_rate is None else self.config.max_rate
            self._made[shape] = depth_rates(flops, self.config.drop_rate, self.name, cap)
        return self._made[shape]
