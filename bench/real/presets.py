"""Which runs, in the order in which they are worth their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .training import Run

COARSE = (
    Run("plain", 0.0, 1e-4, plain_steps=0),
    Run("plain", 0.0, 3e-4),
    Run("default", 0.5, 3e-4),
    Run("freezing", 0.5, 3e-4),
    Run("plain", 0.0, 1e-4),
    Run("default", 0.5, 1e-4),
    Run("default, head trains", 0.5, 1e-4),
    Run("freezing", 0.5, 1e-4),
    Run("exact", 0.5, 1e-4),
    Run("plain", 0.0, 3e-5),
    Run("plain", 0.0, 1e-4, seed=1),
    Run("default", 0.5, 3e-4, seed=1),
    Run("default", 0.25, 1e-4),
    Run("default reversed", 0.5, 1e-4),
    Run("plain", 0.0, 3e-4, tuning="lora"),
    Run("default", 0.5, 3e-4, tuning="lora"),
    Run("plain", 0.0, 1e-4, "choices"),
    Run("default", 0.5, 1e-4, "choices"),
    Run("freezing", 0.5, 1e-4, "choices"),
)

# As people do it: the same rows three times. Every method takes as many steps as plain training; what differs is time.
_EPOCHS = (
    ("full", "plain", 0.0, 1e-4),
    ("full", "default, cache", 0.5, 3e-4),
    ("full", "freezing, cache", 0.5, 3e-4),
    ("full", "default", 0.5, 3e-4),
    ("full", "default, cache", 0.5, 1e-4),
    ("full", "default, cache", 0.75, 3e-4),
    ("lora", "plain", 0.0, 1e-3),
    ("lora", "default, cache", 0.5, 1e-3),
    ("lora", "freezing, cache", 0.5, 1e-3),
    ("full", "freezing", 0.5, 3e-4),
    ("full", "freezing, cache", 0.5, 1e-4),
    ("full", "freezing, cache", 0.75, 3e-4),
    ("full", "published", 0.5, 1e-4),
    ("full", "exact", 0.5, 1e-4),
    ("full", "plain", 0.0, 3e-5),
    ("full", "default, cache", 0.5, 3e-5),
    ("full", "freezing, cache", 0.5, 3e-5),
    ("full", "plain", 0.0, 1e-5),
)
EPOCHS = tuple(
    Run(method, drop_rate, rate, tuning=tuning, plain_steps=60, epochs=3, equal="steps")
    for tuning, method, drop_rate, rate in _EPOCHS
)

ALL = ("default", "freezing", "default reversed", "default narrow", "nested shelf", "exact")
TOY_RATES = {"toy python": (1e-4, 3e-4, 1e-3, 3e-3), "toy prose": (3e-4, 1e-3, 3e-3, 1e-2)}
BEST = {"toy python": (3e-4, 1e-3), "toy prose": (1e-3, 3e-3)}  # of those, for further seeds


def _toys(methods: Sequence[str], rates: Mapping[str, Sequence[float]], seed: int) -> list[Run]:
    """Every method at every rate."""
    tried = [("plain", 0.0), *((method, 0.5) for method in methods)]
    return [
        Run(method, drop_rate, rate, task, plain_steps=64, seed=seed)
        for task, each in rates.items()
        for rate in each
        for method, drop_rate in tried
    ]


TOYS = (*_toys(ALL, TOY_RATES, 0), *_toys(("default", "freezing"), BEST, 1), *_toys(("default", "freezing"), BEST, 2))

PRESETS: Mapping[str, Sequence[Run]] = {
    "smoke": (Run("plain", 0.0, 3e-4, plain_steps=2), Run("default", 0.5, 3e-4, "choices", plain_steps=2)),
    "coarse": COARSE,
    "epochs": EPOCHS,
    "toys": TOYS,
}
