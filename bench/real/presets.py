"""The runs, the most valuable first."""

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

# The usual practice: the same rows three times. Every method takes as many steps as plain training; only time differs.
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

# Nearly all rows of each task, in one epoch at equal FLOPs and in three with equal steps; for a GPU.
_RATES: Mapping[str, Mapping[str, Sequence[float]]] = {
    "full": {
        "plain": (1e-5, 3e-5, 1e-4, 3e-4),
        "default": (3e-5, 1e-4, 3e-4, 1e-3),
        "freezing": (3e-5, 1e-4, 3e-4, 1e-3),
        "exact": (3e-5, 1e-4, 3e-4),
        "published": (3e-5, 1e-4, 3e-4),
    },
    "lora": {
        "plain": (1e-4, 3e-4, 1e-3, 3e-3),
        "default": (3e-4, 1e-3, 3e-3, 1e-2),
        "freezing": (3e-4, 1e-3, 3e-3, 1e-2),
        "exact": (3e-4, 1e-3, 3e-3),
        "published": (3e-4, 1e-3, 3e-3),
    },
}
_LENGTHS = ((48, 1, "flops"), (228, 3, "steps"))
_OTHERS = (
    ("plain, checkpointed", 0.0, (3e-5, 1e-4)),
    ("default", 0.25, (3e-5, 1e-4)),
    ("default", 0.75, (1e-4, 3e-4, 1e-3)),
    ("freezing", 0.75, (1e-4, 3e-4, 1e-3)),
    ("default, head trains", 0.5, (1e-4, 3e-4)),
    ("nested shelf", 0.5, (3e-5, 1e-4)),
)


def _whole(tuning: str, task: str, seed: int) -> list[Run]:
    return [
        Run(method, 0.0 if method == "plain" else 0.5, rate, task, tuning, steps, epochs, seed, equal)
        for steps, epochs, equal in _LENGTHS
        for method, rates in _RATES[tuning].items()
        for rate in rates
    ]


def _others(task: str, seed: int) -> list[Run]:
    return [
        Run(method, drop_rate, rate, task, "full", 48, 1, seed)
        for method, drop_rate, rates in _OTHERS
        for rate in rates
    ]


_WHOLE_TASKS = ("solutions whole", "choices whole")
WHOLE = (
    *(Run("plain", 0.0, 1e-4, task, plain_steps=0) for task in _WHOLE_TASKS),
    *_whole("full", "solutions whole", 0),
    *_whole("lora", "solutions whole", 0),
    *_whole("full", "choices whole", 0),
    *_others("solutions whole", 0),
    *_whole("full", "solutions whole", 1),
    *_whole("lora", "choices whole", 0),
    *_whole("full", "solutions whole", 2),
    *_others("solutions whole", 1),
    *_whole("lora", "solutions whole", 1),
    *_whole("full", "choices whole", 1),
    *_whole("lora", "solutions whole", 2),
    *_whole("full", "choices whole", 2),
    *_others("solutions whole", 2),
    *_others("choices whole", 0),
    *(
        Run(method, drop_rate, rate, task, plain_steps=228, epochs=3)
        for method, drop_rate in (
            ("default, cache", 0.25),
            ("default, cache", 0.5),
            ("default", 0.5),
            ("freezing, cache", 0.5),
        )
        for task, rate in (("solutions whole", 3e-5), ("choices whole", 1e-4))
    ),
)

# The same in one epoch on a third task, by value, so that a CPU gets as far as its hours allow.
_ARITHMETIC = (
    ("plain", 0.0, 1e-4), ("default", 0.5, 1e-4), ("freezing", 0.5, 1e-4), ("published", 0.5, 1e-4),
    ("plain", 0.0, 3e-4), ("default", 0.5, 3e-4), ("freezing", 0.5, 3e-4), ("published", 0.5, 3e-4),
    ("plain", 0.0, 3e-5), ("default", 0.5, 3e-5), ("default", 0.25, 1e-4), ("exact", 0.5, 1e-4),
)  # fmt: skip
ARITHMETIC = (
    Run("plain", 0.0, 1e-4, "arithmetic whole", plain_steps=0),
    *(Run(method, p, rate, "arithmetic whole", plain_steps=48) for method, p, rate in _ARITHMETIC),
)

ALL = ("default", "freezing", "default reversed", "default narrow", "nested shelf", "exact")
TOY_RATES = {"toy python": (1e-4, 3e-4, 1e-3, 3e-3), "toy prose": (3e-4, 1e-3, 3e-3, 1e-2)}
BEST = {"toy python": (3e-4, 1e-3), "toy prose": (1e-3, 3e-3)}  # of these, for further seeds


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
    "whole": WHOLE,
    "arithmetic": ARITHMETIC,
    "toys": TOYS,
}
