"""Which runs, in the order in which they are worth their time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .training import Run

COARSE = (
    Run("plain", 0.0, 3e-4),
    Run("default", 0.5, 3e-4),
    Run("freezing", 0.5, 3e-4),
    Run("plain", 0.0, 1e-4),
    Run("plain", 0.0, 1e-4, plain_steps=0),
    Run("default", 0.5, 1e-4),
    Run("plain", 0.0, 3e-5),
    Run("freezing", 0.5, 1e-4),
    Run("exact", 0.5, 1e-4),
    Run("default reversed", 0.5, 1e-4),
    Run("plain", 0.0, 1e-4, seed=1),
    Run("default", 0.5, 1e-4, seed=1),
    Run("default", 0.75, 1e-4),
    Run("default narrow", 0.5, 1e-4),
    Run("plain", 0.0, 3e-4, tuning="lora"),
    Run("default", 0.5, 3e-4, tuning="lora"),
    Run("plain", 0.0, 1e-4, "choices"),
    Run("default", 0.5, 1e-4, "choices"),
    Run("freezing", 0.5, 1e-4, "choices"),
)

METHODS = (
    ("plain", 0.0),
    *((name, 0.5) for name in ("default", "freezing", "default reversed", "default narrow", "nested shelf", "exact")),
)
TOY_RATES = {"toy python": (1e-4, 3e-4, 1e-3, 3e-3), "toy prose": (3e-4, 1e-3, 3e-3, 1e-2)}
TOYS = tuple(
    Run(method, drop_rate, rate, task, plain_steps=64, seed=seed)
    for seed in range(3)
    for task, rates in TOY_RATES.items()
    for rate in rates
    for method, drop_rate in METHODS
)

PRESETS: Mapping[str, Sequence[Run]] = {
    "smoke": (Run("plain", 0.0, 3e-4, plain_steps=2), Run("default", 0.5, 3e-4, "choices", plain_steps=2)),
    "coarse": COARSE,
    "toys": TOYS,
}
