"""The registry of mask samplers; each entry says what the sampler needs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dropbp.errors import ConfigError

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class Draws:
    """The masks that a sampler makes from rates.

    Attributes:
        draw: returns the mask of a step.
        every: all masks that can occur, if they are few.
        edges: if each mask follows from a number in [0, 1), the smallest number of each of `every`, rising. The masks
            then have an order, in which a run may take them.
    """

    draw: Callable[[int], Mask]
    every: tuple[Mask, ...] | None = None
    edges: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SamplerKind:
    """A registered mask sampler, and what its users must respect.

    Attributes:
        name: the name that selects it.
        build: `build(rates, flops, seed, **options)` returns its `Draws`.
        rates: the depth profile that drop rates follow by default; see `dropbp.masks.rates.depth_rates`.
        annealed_rates: the profile in a run of known length, which takes the masks in order, the deepest first; None if
            they have no order. Options given to the sampler disable this.
        prefixes: whether each mask drops exactly the branches below some depth. Then modules below that depth are
            frozen with them, parallel branches are dropped together, the share of activations that a step keeps is
            limited, and sensitivities set no rates.
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
    """Decorator that registers a function `(rates, flops, seed, *, option=default) -> Draws` as mask sampler `name`.

    `rates` and `flops` arrive checked, as tuples of floats. `draw(step)` must be a pure function of its step. `traits`
    are the other fields of `SamplerKind`.

    Raises ConfigError if the name is taken.
    """

    def register(build: Callable[..., Draws]) -> Callable[..., Draws]:
        if name in _SAMPLERS:
            raise ConfigError(
                f"mask sampler {name!r} is already registered; known are {', '.join(sampler_kinds())}. Choose another "
                "name."
            )
        _SAMPLERS[name] = SamplerKind(name, build, **traits)
        return build

    return register


def sampler_kinds() -> Mapping[str, SamplerKind]:
    """All registered mask samplers by name, in alphabetical order."""
    return dict(sorted(_SAMPLERS.items()))


def sampler_kind(name: str) -> SamplerKind:
    """The mask sampler registered as `name`. Raises ConfigError that lists the known ones if there is none."""
    if name not in tuple(_SAMPLERS):  # not the dict itself, because an unhashable name would raise TypeError
        raise ConfigError(
            f"mask sampler {name!r} is unknown; known are {', '.join(sampler_kinds())}. Pass one of these, or add your "
            "own with dropbp.masks.register_sampler."
        )
    return _SAMPLERS[name]
