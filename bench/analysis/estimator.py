"""`analyze`: the gradient of a model by path length, and the effect of each way of dropping branches on it.

Two views of one batch. By path length (`paths`): how much of the gradient passed how many branches. By mask sampler: a
training step gets a random gradient g'. Relative to the true gradient g it has a bias, E g' - g, and a variance. The
model is enabled and masks are drawn as in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropbp.checks import check_callables, checked_drop_rates, is_integer, short
from dropbp.discovery.discover import find
from dropbp.errors import ConfigError
from dropbp.estimate.workload import in_training
from dropbp.masks import sampler_kind
from dropbp.session import enable

from .paths import PathLength, path_lengths

Closure = Callable[[], Tensor]
DROP_RATES = (0.5, 0.875)
WAYS = (
    ("independent", "none"),
    ("independent", "unbiased"),
    ("exact", "none"),
    ("exact", "unbiased"),
    ("cyclic", "none"),
    ("pool", "none"),
    ("nested", "none"),
)
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The gradient under random masks, compared with the true one. Squares are relative to that of the true gradient.

    Attributes:
        masks: the mask sampler.
        scaling: scaling of the gradients of kept branches.
        drop_rate: share of the branches' FLOPs dropped.
        bias: |E g' - g| / |g|, corrected for sampling noise; 0 where the noise is larger.
        cosine: cosine of E g' and g.
        tensor_cosine: the same per parameter tensor, averaged with the tensors' |g|^2 as weights. It matters for
            optimizers that scale each tensor separately, such as Adam. It is 1 if the mean gradient of every tensor has
            the right direction.
        variance: E |g' - E g'|^2 / |g|^2.
        error: E |g' - g|^2 / |g|^2.
        draws: number of masks drawn; for `nested`, all masks that exist.
    """

    masks: str
    scaling: str
    drop_rate: float
    bias: float
    cosine: float
    tensor_cosine: float
    variance: float
    error: float
    draws: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The result of `analyze`: paths by length, and estimators by mask sampler, scaling and rate."""

    paths: tuple[PathLength, ...]
    estimators: tuple[Estimator, ...]

    def as_dict(self) -> dict[str, Any]:
        """The result as plain numbers, lists and strings, ready for JSON."""
        return dataclasses.asdict(self)


def analyze(
    model: nn.Module,
    closure: Closure,
    *,
    drop_rates: Sequence[float] = DROP_RATES,
    ways: Sequence[tuple[str, str]] = WAYS,
    samples: int = 24,
    draws: int = 64,
    seed: int = 0,
    example_inputs: Any = None,
    progress: Note | None = None,
) -> Analysis:
    """Gradients by path length, and bias and variance of each mask sampler, on one batch. The model is left unchanged.

    Args:
        model: not enabled, and without active dropout, which would make each forward a different function.
        closure: runs one forward on the same batch each time and returns the loss.
        drop_rates: drop rates of the estimators.
        ways: pairs of mask sampler and scaling.
        samples: paths sampled per length.
        draws: masks drawn per mask sampler.
        seed: seed of paths and masks.
        example_inputs: as in `dropbp.enable`.
        progress: called with one line of text before each part of the work.

    Raises:
        ConfigError: an argument is not allowed.
        DiscoveryError: no residual branch was found.
        StateError: the model is already enabled.
    """
    if not is_integer(samples, 1) or not is_integer(draws, 2):
        given = f"samples is {short(samples)} and draws {short(draws)}"
        raise ConfigError(f"{given}; allowed: samples >= 1 and draws >= 2.")
    rates, pairs = checked_drop_rates(drop_rates), _pairs(ways)
    if not callable(closure):
        raise ConfigError(f"closure is {short(closure)}; it must run one forward and return the loss.")
    check_callables(progress=progress)
    note = progress or (lambda line: None)
    with enable(model, 0.0, seed=seed, example_inputs=example_inputs):
        pass  # refuse whatever `enable` refuses
    with in_training(model):
        note("paths by length")
        structure = find(model, example_inputs, None).structure
        paths = path_lengths(model, structure, closure, samples, seed)
        true = _gradients(model, closure)
        estimators = []
        for rate in rates:
            for masks, scaling in pairs:
                note(f"{masks} masks, scaling {scaling}, drop rate {rate:g}")
                options = {"masks": masks, "scaling": scaling, "seed": seed, "example_inputs": example_inputs}
                if sampler_kind(
                    masks
                ).prefixes:  # masks are set one by one here, and must freeze the same parameters as drawn ones
                    options["stem"] = "rest"
                with enable(model, rate, max_activations=None, **options) as handle:
                    drawn = handle.schedule.every if handle.engine.prefixes else None
                    weights = _weights(handle.rates, drawn) if drawn else [1 / draws] * draws
                    gradients = _masked(model, closure, handle, drawn, draws)
                    estimators.append(_estimator((masks, scaling, rate), true, gradients, weights, drawn is not None))
    return Analysis(paths, tuple(estimators))


def _pairs(ways: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    try:
        return [(masks, scaling) for masks, scaling in ways]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"ways is {short(ways)}; it must be pairs of a mask sampler and a scaling: [('exact', 'unbiased')]."
        ) from error


def _masked(model: nn.Module, closure: Closure, handle: Any, drawn: Any, draws: int) -> Iterator[dict[str, Tensor]]:
    """Gradients under drawn masks, or under all masks that exist."""
    if drawn is None:
        for _ in range(draws):
            yield _gradients(model, closure)
        return
    for mask in drawn:
        with handle.fixed(mask):
            yield _gradients(model, closure)


def _weights(rates: Sequence[float], masks: Sequence[Sequence[bool]]) -> list[float]:
    """The probability of each nested mask: it drops every branch whose rate exceeds a uniform number in 0..1."""
    weights = []
    for mask in masks:
        above = max((rate for rate, drop in zip(rates, mask, strict=True) if not drop), default=0.0)
        below = min((rate for rate, drop in zip(rates, mask, strict=True) if drop), default=1.0)
        weights.append(below - above)
    return weights


def _gradients(model: nn.Module, closure: Closure) -> dict[str, Tensor]:
    """Gradients by parameter name, without skipped parameters."""
    loss = closure()
    if loss.requires_grad:
        loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _estimator(
    name: tuple[str, str, float],
    true: dict[str, Tensor],
    gradients: Iterator[dict[str, Tensor]],
    weights: Sequence[float],
    complete: bool,
) -> Estimator:
    mean = {key: torch.zeros_like(g) for key, g in true.items()}
    square = cross = 0.0
    for weight, gradient in zip(weights, gradients, strict=True):
        for key, g in gradient.items():
            mean[key] += weight * g
        square += weight * _product(gradient, gradient)
        cross += weight * _product(gradient, true)
    whole, mean_square = _product(true, true), _product(mean, mean)
    variance = square - mean_square
    noise = 0.0
    if not complete:  # 1/n of the variance is noise of the mean, and the sample variance is itself too small
        variance *= len(weights) / (len(weights) - 1)
        noise = variance / len(weights)
    masks, scaling, rate = name
    return Estimator(
        masks, scaling, rate,
        bias=math.sqrt(max(0.0, mean_square - 2 * cross + whole - noise) / whole),
        cosine=_cosine(cross, mean_square - noise, whole),
        tensor_cosine=_tensor_cosine(mean, true, whole),
        variance=variance / whole,
        error=(square - 2 * cross + whole) / whole,
        draws=len(weights),
    )  # fmt: skip


def _tensor_cosine(mean: dict[str, Tensor], true: dict[str, Tensor], whole: float) -> float:
    total = 0.0
    for key, g in true.items():
        own = float((g * g).sum())
        total += own * _cosine(float((mean[key] * g).sum()), float((mean[key] * mean[key]).sum()), own)
    return total / whole


def _product(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return math.fsum(float((g * other[key]).sum()) for key, g in one.items())


def _cosine(product: float, one_square: float, other_square: float) -> float:
    if one_square <= 0 or other_square <= 0:
        return 0.0
    return min(1.0, product / math.sqrt(one_square * other_square))
