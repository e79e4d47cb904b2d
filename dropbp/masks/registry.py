"""The registry of mask samplers: each says what it is and what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dropbp.errors import ConfigError

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Draws:
    """What a mask sampler makes of rates.

    Attributes:
        draw: the mask of a step.
        every: all masks that can occur, if they are few.
        edges: where each of `every` follows from a number from 0 to below 1, the smallest number of each, rising: the
            masks then have an order, in which a run may take them.
    """

    draw: Callable[[int], Mask]
    every: tuple[Mask, ...] | None = None
    edges: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SamplerKind:
    """A registered mask sampler, and what it asks of those who use it.

    Attributes:
        name: it is chosen by.
        build: `build(rates, flops, seed, **options)` gives its `Draws`.
        rates: the depth profile that drop rates follow by default; see `dropbp.masks.rates.depth_rates`.
        annealed_rates: the profile in a run of known length, whose masks are then taken in their order, the deepest
            first; None where they have no order. Options given to the sampler keep it from that.
        prefixes: each mask drops the lowest branches and no others. Then what lies below the border is frozen with
            them, parallel branches are dropped together, the share of activations that a step keeps is limited, and
            sensitivities set no rates.
    """

    name: str
    build: Callable[..., Draws]
    rates: str = "uniform"
    annealed_rates: str | None = None
    prefixes: bool = False

    @property
    def summary(self) -> str:
        """First line of the sampler's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the options that `build` takes by keyword."""
        parameters = inspect.signature(self.build).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


_SAMPLERS: dict[str, SamplerKind] = {}


def register_sampler(name: str, **traits: Any) -> Callable[[Callable[..., Draws]], Callable[..., Draws]]:
    """Decorator that makes a function `(rates, flops, seed, *, option=default) -> Draws` known as mask sampler `name`.

    `rates` and `flops` arrive checked, as tuples of floats. `draw(step)` must be a pure function of its step. `traits`
    are what the sampler asks of those who use it: see `SamplerKind`.

    Raises:
        ConfigError: the name is taken.
    """

    def register(build: Callable[..., Draws]) -> Callable[..., Draws]:
        if name in _SAMPLERS:
            raise ConfigError(
                f"mask sampler {name!r} is registered already; known are {', '.join(sampler_kinds())}. Rename."
            )
        _SAMPLERS[name] = SamplerKind(name, build, **traits)
        return build

    return register


def sampler_kinds() -> Mapping[str, SamplerKind]:
    """All registered mask samplers by name, in alphabetical order."""
    return dict(sorted(_SAMPLERS.items()))


def sampler_kind(name: str) -> SamplerKind:
    """The mask sampler registered as `name`. Raises ConfigError that lists the known ones."""
    if name not in tuple(_SAMPLERS):  # not the mapping, which would want to hash it
        raise ConfigError(
            f"mask sampler {name!r} is unknown; known are {', '.join(sampler_kinds())}. Pass one of these, or add your "
            "own with dropbp.masks.register_sampler."
        )
    return _SAMPLERS[name]
