"""The options of `enable`, and their checks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dropbp.checks import is_number, is_whole
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
        boundary: where to cut the graph of a lazy device: `none`, `layer`, `sublayer`; `auto` asks the device.
        fill: gradient of skipped parameters. `none` leaves it None, so the optimizer does not move them. `zero` fills
            it with zeros, so weight decay and momentum still move them. `auto` asks the device.
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
        _check_drop_rate(self.drop_rate)
        _check_choice("scaling", self.scaling, SCALINGS)
        _check_choice("boundary", self.boundary, BOUNDARIES)
        _check_choice("fill", self.fill, FILLS)
        _check_choice("stem", self.stem, STEMS)
        _check_choice("logits", self.logits, LOGITS)
        _check_activations(self.max_activations)
        _check_rates(self.rates)
        _check_max_rate(self.max_rate)
        _check_resample(self.resample)
        _check_warmup(self.warmup)
        _check_steps(self.steps)
        _check_max_scale(self.max_scale)
        _check_cache(self.activation_cache, self.activation_cache_limit)
        _check_integer("seed", self.seed)
        _check_bool("rehearse", self.rehearse)


def make_config(
    drop_rate: float, masks: str, seed: int, options: Mapping[str, Any], samplers: Mapping[str, Sequence[str]]
) -> Config:
    """Build the configuration. Options that are no field of `Config` belong to the sampler (`pool_size`, ...).

    `samplers` maps the name of each known sampler to the options it takes.
    """
    own = {field.name for field in dataclasses.fields(Config)} - {"mask_options"}
    known = {name: value for name, value in options.items() if name in own}
    extra = {name: value for name, value in options.items() if name not in own}
    _check_choice("masks", masks, tuple(samplers))
    _check_extra(masks, extra, sorted(own - {"drop_rate", "masks", "seed"}), samplers[masks])
    return Config(drop_rate=drop_rate, masks=masks, seed=seed, **known, mask_options=extra)


def _check_extra(masks: str, extra: Mapping[str, Any], own: Sequence[str], allowed: Sequence[str]) -> None:
    unknown = sorted(set(extra) - set(allowed))
    if unknown:
        raise ConfigError(
            f"unknown option {unknown[0]!r}; options are {', '.join(own)}"
            + (f", and {', '.join(allowed)} for masks={masks!r}." if allowed else ".")
        )


def _check_drop_rate(drop_rate: Any) -> None:
    if not is_number(drop_rate) or not 0 <= drop_rate < 1:
        raise ConfigError(
            f"drop_rate is {drop_rate!r}; it is the share of backward FLOPs to skip, 0 <= drop_rate < 1. "
            "0.5 halves the blocks' backward; the paper uses 0.5, 0.75 and 0.875."
        )


def _check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}.")


def _check_activations(value: Any) -> None:
    if value is not None and value != "auto" and not (is_number(value) and 0 < value <= 1):
        raise ConfigError(
            f"max_activations is {value!r}; allowed: a share with 0 < share <= 1, None (no limit), or 'auto'."
        )


def _check_resample(resample: Any) -> None:
    if resample in ("forward", "step") and isinstance(resample, str):
        return
    if not is_whole(resample, 1):
        raise ConfigError(
            f"resample is {resample!r}; allowed: 'forward', 'step' (with handle.resample() once per optimizer step), "
            "or an integer of at least 1: the number of training forwards that share a mask."
        )


def _check_rates(rates: Any) -> None:
    if isinstance(rates, str):
        _check_choice("rates", rates, RATES)
    elif not isinstance(rates, Iterable):
        raise ConfigError(f"rates is {rates!r}; allowed: one of {', '.join(RATES)}, or a rate from 0 to 1 per branch.")


def _check_max_rate(max_rate: Any) -> None:
    if max_rate is not None and not (is_number(max_rate) and 0 <= max_rate <= 1):
        raise ConfigError(f"max_rate is {max_rate!r}; it must be a number from 0 to 1, or None.")


def _check_warmup(warmup: Any) -> None:
    if not is_whole(warmup, 0):
        raise ConfigError(f"warmup is {warmup!r}; it must be a whole number of training forwards, at least 0.")


def _check_steps(steps: Any) -> None:
    if steps is not None and not is_whole(steps, 1):
        raise ConfigError(
            f"steps is {steps!r}; it must be the number of training forwards of the run, at least 1, or None if it is "
            "unknown."
        )


def _check_max_scale(max_scale: Any) -> None:
    if not is_number(max_scale) or not max_scale >= 1:
        raise ConfigError(f"max_scale is {max_scale!r}; it must be a number of at least 1.")


def _check_cache(where: Any, limit: Any) -> None:
    if where is not None and (where == "" or not isinstance(where, (bool, str, os.PathLike))):
        raise ConfigError(
            f"activation_cache is {where!r}; allowed: True (memory of the host), the path of a folder, or None (off)."
        )
    if limit is not None and not is_whole(limit, 1):
        raise ConfigError(f"activation_cache_limit is {limit!r}; it must be a number of bytes of at least 1, or None.")


def _check_integer(name: str, value: Any) -> None:
    if not is_whole(value):
        raise ConfigError(f"{name} is {value!r}; it must be an integer.")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be True or False.")
