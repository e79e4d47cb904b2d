"""The options of `enable`, and their checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dropbp.checks import is_integer, is_number
from dropbp.errors import ConfigError

SCALINGS = ("none", "unbiased", "clipped")
BOUNDARIES = ("auto", "none", "layer", "sublayer")
FILLS = ("auto", "none", "zero")
STEMS = ("auto", "train", "rest")
LOGITS = ("all", "labelled")
RATES = ("auto", "uniform", "shelf", "geometric", "linear", "uniform_depth", "freeze", "band")


@dataclasses.dataclass(frozen=True)
class Config:
    """How branches are dropped.

    Attributes:
        drop_rate: share of the branches' backward FLOPs to skip, 0 <= drop_rate < 1.
        masks: name of the sampler that draws masks; see `dropbp.masks.sampler_kinds()`.
        seed: seed of the mask generator; the same on every rank.
        rates: initial drop rate of each branch: `uniform` (all `drop_rate`), a depth profile of
            `dropbp.masks.rates.depth_rates`, or a sequence of numbers. `auto` takes what suits the sampler.
        max_rate: upper bound of a branch's drop rate; None leaves it to the allocation.
        resample: when to draw a new mask: `forward` (each training forward), `step` (when `handle.resample()` is
            called, once per optimizer step), or an integer K (every K training forwards).
        scaling: factor on the gradients of kept branches: `none`, `unbiased` (1/(1-rate)), `clipped` (at most
            `max_scale`).
        max_scale: largest factor of `clipped`.
        stem: how to treat parameters below the lowest kept branch that lie in no branch: embeddings, projectors, class
            tokens, positions, shared biases. `rest`: they get no gradient in such a step, since theirs would come
            through the residual stream alone. `train`: they train in every step. `auto`: `rest` under `nested` masks;
            `train` under all others and under `handle.fixed(mask)`. `handle.report()["at_rest"]` names the affected
            parameters.
        max_activations: share of the branches' activations, by FLOPs, that a step may keep for its backward. Blocks
            beyond it, from the input upwards, are recomputed in the backward if their forward proves to be pure;
            `handle.report()["not_recomputed"]` names the others. None: no limit. `auto`: 1 - drop_rate under `nested`,
            whose deepest steps would otherwise need the memory of a full backward; else None.
        warmup: number of training forwards at the start that drop nothing.
        steps: number of training forwards after the warm-up (of optimizer steps with `resample="step"`), if known.
            Nested masks then anneal: the deepest steps come first, which learns more in the same time
            (docs/learning.md). None: depths are drawn without annealing.
        logits: which logits a causal language model computes when it is called with labels: `all`, or `labelled`, only
            those of positions whose next token has a label; see `dropbp.labelled_logits`.
        activation_cache: where to store the activations of rows seen before. Such rows then start at the border below
            which nothing trains any more (docs/activation_cache.md). True (host memory), a folder, or None (off).
        activation_cache_limit: largest size of the cache in bytes; None: half of the free memory or disk space.
        boundary: where to cut the graph of a lazy device: `none`, `layer`, `sublayer`; `auto` leaves it to the device.
        fill: gradient of skipped parameters. `none` leaves it None, so the optimizer does not move them. `zero` fills
            it with zeros, so weight decay and momentum still move them. `auto` leaves it to the device.
        rehearse: whether the first steps use, out of the coming masks, those for which a lazy device must compile a new
            graph. Other devices gain nothing from it.
        mask_options: further options of the sampler, such as `pool_size`.
    """

    drop_rate: float
    masks: str = "nested"
    seed: int = 0
    rates: str | Sequence[float] = "auto"
    max_rate: float | None = None
    resample: str | int = "forward"
    scaling: str = "none"
    max_scale: float = 2.0
    stem: str = "auto"
    max_activations: str | float | None = "auto"
    warmup: int = 0
    steps: int | None = None
    logits: str = "all"
    activation_cache: bool | str | os.PathLike[str] | None = None
    activation_cache_limit: int | None = None
    boundary: str = "auto"
    fill: str = "auto"
    rehearse: bool = False
    mask_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def draws(self) -> int | None:
        """Number of masks drawn in the run after its warm-up; None if its length is unknown."""
        kept_for = self.resample if isinstance(self.resample, int) else 1
        return None if self.steps is None else -(-self.steps // kept_for)

    def __post_init__(self) -> None:
        for name, is_allowed, message in _ALLOWED:
            value = getattr(self, name)
            if not is_allowed(value):
                raise ConfigError(f"{name} is {value!r}; {message}")


def make_config(
    drop_rate: float, masks: str, seed: int, options: Mapping[str, Any], samplers: Mapping[str, Sequence[str]]
) -> Config:
    """Build the configuration. Options that are no field of `Config` belong to the sampler (`pool_size`, ...).

    `samplers` maps the name of each known sampler to the options it takes.
    """
    own = {field.name for field in dataclasses.fields(Config)} - {"mask_options"}
    known = {name: value for name, value in options.items() if name in own}
    extra = {name: value for name, value in options.items() if name not in own}
    is_known, names = _one_of(tuple(samplers))
    if not is_known(masks):
        raise ConfigError(f"masks is {masks!r}; {names}")
    _check_extra(masks, extra, sorted(own - {"drop_rate", "masks", "seed"}), samplers[masks])
    return Config(drop_rate=drop_rate, masks=masks, seed=seed, **known, mask_options=extra)


def _check_extra(masks: str, extra: Mapping[str, Any], own: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = sorted(set(extra) - set(allowed))
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]!r}; options are {', '.join(own)}"
            + (f", and {', '.join(allowed)} for masks={masks!r}." if allowed else ".")
        )


def _one_of(choices: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, f"allowed: {', '.join(choices)}."


def _is_resample(value: Any) -> bool:
    return is_integer(value, 1) or (isinstance(value, str) and value in ("forward", "step"))


def _is_place(value: Any) -> bool:
    return value is None or (value != "" and isinstance(value, (bool, str, os.PathLike)))


# For each option, whether a value is allowed, and the end of the message about one that is not.
_ALLOWED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "drop_rate",
        lambda rate: is_number(rate) and 0 <= rate < 1,
        "it is the share of backward FLOPs to skip, 0 <= drop_rate < 1; the paper uses 0.5, 0.75 and 0.875.",
    ),
    ("scaling", *_one_of(SCALINGS)),
    ("boundary", *_one_of(BOUNDARIES)),
    ("fill", *_one_of(FILLS)),
    ("stem", *_one_of(STEMS)),
    ("logits", *_one_of(LOGITS)),
    (
        "max_activations",
        lambda limit: limit in (None, "auto") or (is_number(limit) and 0 < limit <= 1),
        "allowed: a share with 0 < share <= 1, None (no limit), or 'auto'.",
    ),
    ("rates", lambda rates: not isinstance(rates, str) or rates in RATES, f"allowed: {', '.join(RATES)}."),
    (
        "rates",
        lambda rates: isinstance(rates, Iterable),
        f"allowed: one of {', '.join(RATES)}, or a rate from 0 to 1 per branch.",
    ),
    (
        "max_rate",
        lambda rate: rate is None or (is_number(rate) and 0 <= rate <= 1),
        "it must be a number from 0 to 1, or None.",
    ),
    (
        "resample",
        _is_resample,
        "allowed: 'forward', 'step' (with handle.resample() in each step), or how many forwards share a mask, from 1.",
    ),
    ("warmup", lambda count: is_integer(count, 0), "it must be a whole number of training forwards, at least 0."),
    (
        "steps",
        lambda count: count is None or is_integer(count, 1),
        "it must be the number of training forwards of the run, at least 1, or None if it is unknown.",
    ),
    ("max_scale", lambda scale: is_number(scale) and scale >= 1, "it must be a number of at least 1."),
    ("activation_cache", _is_place, "allowed: True (memory of the host), the path of a folder, or None (off)."),
    (
        "activation_cache_limit",
        lambda limit: limit is None or is_integer(limit, 1),
        "it must be a number of bytes of at least 1, or None.",
    ),
    ("seed", is_integer, "it must be an integer."),
    ("rehearse", lambda value: isinstance(value, bool), "it must be True or False."),
)
