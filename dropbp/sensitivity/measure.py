"""Measures how much each branch matters to the gradients: the sensitivities that determine the drop rates.

There are two methods. `exact` is the paper's: one backward with everything kept, then one with each branch dropped
alone, `S_l = sum over parameters of (|g| - |g without l|)^2`: N+1 passes for N branches. `one-pass` estimates the same
from one backward and two forwards (`dropbp.sensitivity.onepass`).

Both run only the given closure, and restore parameters, gradients, buffers, random state and modes. Source of the
measure: DropBP, arXiv:2402.17812, section 3.2, in its gradient-norm form.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dropbp import branch_sets
from dropbp._torch import compiled_code_off
from dropbp.device import save_rng_state
from dropbp.discovery.structure import Structure
from dropbp.engine.distributed import is_multi_rank
from dropbp.errors import ConfigError, StateError
from dropbp.sensitivity.onepass import Observation, OnePass
from dropbp.sensitivity.restore import training_state_restored
from dropbp.tensors import unsharded

Closure = Callable[[], torch.Tensor]
Masking = Callable[[Sequence[bool]], contextlib.AbstractContextManager[Any]]  # runs forwards under a mask, uncounted
METHODS = ("one-pass", "exact")


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of a calibration.

    Attributes:
        sensitivities: S_l, one per branch, in units of squared gradient norm.
        rates: the resulting drop rates under the FLOPs budget, one per branch, 0..1.
        own: the part of S_l from the branch's own parameters (all of S_l for `exact`).
        method: `one-pass` or `exact`.
        passes: number of backward passes.
        seconds: wall-clock time.
    """

    sensitivities: tuple[float, ...]
    rates: tuple[float, ...]
    own: tuple[float, ...]
    method: str
    passes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Sensitivities, and the part of each that comes from the branch's own parameters."""

    sensitivities: tuple[float, ...]
    own: tuple[float, ...]
    passes: int


def measure(
    model: nn.Module, structure: Structure, closures: Sequence[Closure], masked: Masking, method: str
) -> tuple[Estimate, float]:
    """Sensitivities averaged over the closures, the same on every rank, and the seconds it took.

    Raises:
        ConfigError: the method is unknown, there is no closure, or a closure does not return a loss.
        StateError: a loss or gradient is not finite, or gradients cannot be read here.
    """
    if method not in METHODS:
        raise ConfigError(f"method is {method!r}; allowed: {', '.join(METHODS)}.")
    if not closures:
        raise ConfigError("No closure was given. Pass a function that runs one forward and returns the loss.")
    start = time.perf_counter()
    observe = _exact if method == "exact" else _one_pass
    with training_state_restored(model):
        observations = [observe(model, structure, closure, masked) for closure in closures]
    passes = len(closures) * (len(structure.branches) + 1 if method == "exact" else 1)
    return _averaged(observations, _device(model), passes), time.perf_counter() - start


def _exact(model: nn.Module, structure: Structure, closure: Closure, masked: Masking) -> Observation:
    """Run one pass per branch, which never needs more memory than a training step."""
    count = len(structure.branches)
    rewind = save_rng_state(model)
    norms = _norms_under(model, closure, masked, [False] * count)
    scores = []
    for branch in range(count) if _finite(norms) else ():
        rewind()
        without = _norms_under(model, closure, masked, [i == branch for i in range(count)])
        scores.append(math.fsum((norms[n] - without.get(n, 0.0)) ** 2 for n in norms))
    zeros = (0.0,) * count
    return Observation(tuple(scores) or (math.nan,) * count, zeros, zeros, zeros)


def _norms_under(model: nn.Module, closure: Closure, masked: Masking, mask: Sequence[bool]) -> dict[str, float]:
    with masked(mask):
        loss = checked_loss(closure())
    loss.backward()
    squares = gradient_squares(model)
    model.zero_grad(set_to_none=True)
    return {name: math.sqrt(square) for name, square in squares.items()}


def _one_pass(model: nn.Module, structure: Structure, closure: Closure, masked: Masking) -> Observation:
    one_pass = OnePass(model, structure)
    nothing = [False] * len(structure.branches)
    rewind = save_rng_state(model)
    with masked(nothing), compiled_code_off():
        with one_pass.first_forward(lambda: checked_loss(closure())) as loss:
            loss.backward()
        del loss
        squares = gradient_squares(model)
        step = _min_over_ranks(one_pass.step(squares) if _finite(squares) else 0.0, _device(model))
        if step:
            rewind()
            with moved_along_gradients(model, step) as step, one_pass.second_forward(), torch.no_grad():
                closure()
    return one_pass.observation(squares, step)


@contextlib.contextmanager
def moved_along_gradients(model: nn.Module, step: float) -> Iterator[float]:
    """Move parameters by `step` times their gradients; restore them bit-identically afterwards.

    Yields the actual length of the step, which differs by the rounding of the parameters. The gradients are freed, so
    that the copies of the parameters need no additional memory.
    """
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    moved, squares = [], []
    try:
        for parameter in model.parameters():
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                kept.append((parameter, parameter.data.clone()))
                parameter.data.add_(gradient.to(parameter.dtype), alpha=step)
                moved.append(unsharded(((parameter.data.float() - kept[-1][1].float()) * gradient).sum()))
                squares.append(squared_norm(gradient))
        torch.clear_autocast_cache()  # which holds casts of the unmoved parameters
        yield math.fsum(_numbers(moved)) / math.fsum(_numbers(squares))
    finally:
        for parameter, original in kept:
            parameter.data.copy_(original)
        torch.clear_autocast_cache()


def checked_loss(loss: Any) -> torch.Tensor:
    """The loss, if it is a single number with a graph. Raises ConfigError otherwise."""
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.grad_fn is not None:
        return loss
    what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    raise ConfigError(
        f"The closure returned {what}; it must run one forward and return the loss, a tensor with one element and a "
        "graph. Do not call backward in it, nor run it under no_grad."
    )


def gradient_squares(model: nn.Module) -> dict[str, float]:
    """Squared norm of every existing gradient, by parameter name."""
    squares = {name: squared_norm(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return dict(zip(squares, _numbers(list(squares.values())), strict=True))


def own_squares(model: nn.Module, parameters: Mapping[str, int], count: int) -> list[float]:
    """Squared norm of the current gradients of each branch's own parameters."""
    squares = [0.0] * count
    for name, square in gradient_squares(model).items():
        own = branch_sets.sole(parameters.get(name, 0))
        if own:
            squares[own.bit_length() - 1] += square
    return squares


def squared_norm(gradient: torch.Tensor) -> torch.Tensor:
    """Squared norm of the whole gradient as a tensor of one element, even if each rank holds a shard."""
    values: Any = gradient.coalesce().values() if gradient.is_sparse else gradient
    return unsharded(values.detach().float().square().sum())


def _numbers(scalars: Sequence[torch.Tensor]) -> list[float]:
    """The values of the scalars, with one transfer from each device."""
    values = [0.0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        places = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        for place, value in zip(places, torch.stack([scalars[i] for i in places]).tolist(), strict=True):
            values[place] = value
    return values


def _finite(values: Mapping[str, float]) -> bool:
    return all(math.isfinite(value) for value in values.values())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _averaged(observations: Sequence[Observation], device: torch.device, passes: int) -> Estimate:
    """Average observations over ranks, which hold parts of one batch, and results over closures, which are batches."""
    rows = torch.tensor([[o.own, o.below, o.inner_products, o.ratios] for o in observations], dtype=torch.float64)
    averages = [Observation(*(tuple(values) for values in row)) for row in mean_over_ranks(rows, device).tolist()]
    scores = _mean([observation.sensitivities() for observation in averages])
    if not all(math.isfinite(score) for score in scores):
        raise StateError(
            "A sensitivity is not finite: the loss or a gradient overflowed or was NaN. Nothing was changed. Calibrate "
            "on another batch, or later."
        )
    return Estimate(scores, _mean([observation.own for observation in averages]), passes)


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(math.fsum(column) / len(rows) for column in zip(*rows, strict=True))


def mean_over_ranks(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The mean over all ranks, so that every rank allocates the same rates."""
    return _over_ranks(values, device, "SUM") / (torch.distributed.get_world_size() if is_multi_rank() else 1)


def _min_over_ranks(value: float, device: torch.device) -> float:
    """The minimum over ranks: those that hold shards of one parameter must move it equally."""
    return float(_over_ranks(torch.tensor(value, dtype=torch.float64), device, "MIN"))


def _over_ranks(values: torch.Tensor, device: torch.device, operation: str) -> torch.Tensor:
    if not is_multi_rank():
        return values
    wide = device.type in ("cpu", "cuda")  # many other devices have no float64
    on_device = values.to(device, torch.float64 if wide else torch.float32)
    torch.distributed.all_reduce(on_device, getattr(torch.distributed.ReduceOp, operation))
    return on_device.cpu().double()
