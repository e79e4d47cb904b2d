"""`analyze`: where a model's gradient comes from, and what each way of dropping branches does to it.

Two views of one batch. By path length (`paths`): how much of the gradient came through how many
branches. By mask sampler: the gradient g' that a training step gets is a random one; beside the true gradient g it has
a bias, E g' - g, and a variance. Masks are drawn as in training, and the model is enabled as in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dropbp.checks import check_callables, checked_drop_rates, is_whole, short
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
    """The gradient under random masks beside the true one; squares are relative to the true one's.

    Attributes:
        masks: the mask sampler.
        scaling: of kept branches' gradients.
        drop_rate: share of the branches' FLOPs dropped.
        bias: |E g' - g| / |g|, freed of the noise of the draws; 0 where that is larger.
        cosine: of E g' and g.
        tensor_cosine: the same for each parameter tensor by itself, averaged with weights |g|^2 of the tensors. It is
            what an optimizer sees that gives each tensor a scale of its own, as Adam does: 1 where every tensor's
            mean gradient points the right way.
        variance: E |g' - E g'|^2 / |g|^2.
        error: E |g' - g|^2 / |g|^2.
        draws: masks drawn; of `nested`, all that there are.
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
    """What `analyze` returns: paths by length, and estimators by mask sampler, scaling and rate."""

    paths: tuple[PathLength, ...]
    estimators: tuple[Estimator, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
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
    """Gradients by path length, and bias and variance of each mask sampler, on one batch. The model is as before after.

    Args:
        model: not enabled; with dropout each forward is another function, so switch it off.
        closure: runs one forward of the same batch and returns the loss.
        drop_rates: for the estimators.
        ways: pairs of mask sampler and scaling.
        samples: paths of each length.
        draws: masks of each mask sampler.
        seed: of paths and masks.
        example_inputs: as in `dropbp.enable`.
        progress: called with a line before each part of the work.

    Raises:
        ConfigError: an argument is outside what is allowed.
        DiscoveryError: no residual branch was found.
        StateError: the model is enabled already.
    """
    if not is_whole(samples, 1) or not is_whole(draws, 2):
        given = f"samples is {short(samples)} and draws {short(draws)}"
        raise ConfigError(f"{given}; allowed: samples >= 1 and draws >= 2.")
    rates, pairs = checked_drop_rates(drop_rates), _pairs(ways)
    if not callable(closure):
        raise ConfigError(f"closure is {short(closure)}; it must run one forward and return the loss.")
    check_callables(progress=progress)
    note = progress or (lambda line: None)
    with enable(model, 0.0, seed=seed, example_inputs=example_inputs):
        pass  # what `enable` refuses is refused here
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
                ).prefixes:  # its masks are given one by one here, and must freeze what they do when drawn
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
    """Gradients under masks that are drawn, or under all there are."""
    if drawn is None:
        for _ in range(draws):
            yield _gradients(model, closure)
        return
    for mask in drawn:
        with handle.fixed(mask):
            yield _gradients(model, closure)


def _weights(rates: Sequence[float], masks: Sequence[Sequence[bool]]) -> list[float]:
    """How often each nested mask comes: it drops every branch whose rate is above a number uniform in 0..1."""
    weights = []
    for mask in masks:
        above = max((rate for rate, drop in zip(rates, mask, strict=True) if not drop), default=0.0)
        below = min((rate for rate, drop in zip(rates, mask, strict=True) if drop), default=1.0)
        weights.append(below - above)
    return weights


def _gradients(model: nn.Module, closure: Closure) -> dict[str, Tensor]:
    """By name; skipped parameters are left out."""
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
    if not complete:  # the mean of n draws is off by a share 1/n of the variance, which is itself seen too small
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
