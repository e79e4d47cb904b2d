"""Peak memory of a step at any batch shape, from a few small steps.

A step is a fixed sequence of operations. The bytes of live tensors after each operation are a polynomial in the batch
shape: linear in the rows, quadratic in the length (attention scores). So the live bytes at two numbers of rows and
three lengths give those at any shape. The largest is the peak, whichever operation it belongs to. The optimizer's part
is counted on tensors without data.

Only bytes of tensors are counted (`dropbp.memory`), without the allocator's overhead and scratch memory inside kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dropbp.errors import ConfigError
from dropbp.estimate.workload import Workload
from dropbp.flops import Shape
from dropbp.memory import TensorBytes, track_tensor_bytes

Lines = dict[tuple[int, int], torch.Tensor]  # by rows and length
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

SMALL_UNIT, LARGE_UNIT = 8, 64
UNITS = (1, 2, 3)


class _Timeline(TorchDispatchMode):
    """Records the live bytes after each operation."""

    supports_higher_order_operators = True

    def __init__(self, tracked: TensorBytes) -> None:
        super().__init__()
        self.tracked = tracked
        self.live_bytes = [tracked.live_bytes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.live_bytes.append(self.tracked.live_bytes)
        return outputs


@dataclasses.dataclass(frozen=True)
class Probe:
    """The small shapes at which steps are counted. `single_row`: also one row, a special case in some kernels."""

    lengths: tuple[int, ...]
    single_row: bool
    rows: tuple[int, int] = (2, 3)

    @property
    def smallest(self) -> Shape:
        """The shape for steps whose size does not matter."""
        return Shape(self.rows[0], self.lengths[0])

    @property
    def largest(self) -> Shape:
        """The largest shape: if it fits, all others do."""
        return Shape(self.rows[-1], self.lengths[-1])


def probe_for(shape: Shape) -> Probe:
    """Small shapes that behave like `shape`."""
    length = shape.sequence_length
    unit = min(LARGE_UNIT, length // (UNITS[-1] + 1))
    return Probe(tuple(unit * n for n in UNITS) if unit >= SMALL_UNIT else (length,), shape.batch_size == 1)


class Footprint:
    """The memory of steps that all drop the same branches.

    `run` runs one step of a shape under the mask. With `held_gradients` all gradients exist from the start, as in the
    second of several micro-batches.
    """

    def __init__(
        self, run: Callable[[Shape], None], probe: Probe, workload: Workload, held_gradients: bool = False
    ) -> None:
        self.probe = probe

        def lines(sizes: Sequence[int]) -> Lines:
            return _comparable(
                {
                    (rows, length): _timeline(run, Shape(rows, length), workload.model, held_gradients)
                    for rows in sizes
                    for length in probe.lengths
                }
            )

        self._lines, self._single_row = lines(probe.rows), lines((1,)) if probe.single_row else None
        self.trained = [n for n, p in workload.model.named_parameters() if p.grad is not None]
        workload.model.zero_grad(set_to_none=True)

    def peak_bytes(self, shape: Shape) -> int:
        """Peak bytes in forward and backward, with those of the model."""
        return int(self._at(shape).max())

    def end_bytes(self, shape: Shape) -> int:
        """The bytes alive after the backward."""
        return int(self._at(shape)[-1])

    def _at(self, shape: Shape) -> torch.Tensor:
        weights = dict(zip(self.probe.lengths, _lagrange(self.probe.lengths, shape.sequence_length), strict=True))
        if self._single_row is not None and shape.batch_size == 1:
            return _sum(weights[length] * line for (_, length), line in self._single_row.items())
        first, second = self.probe.rows
        share = (shape.batch_size - first) / (second - first)
        parts = {first: 1 - share, second: share}
        return _sum(parts[rows] * weights[length] * line for (rows, length), line in self._lines.items())


def _sum(lines: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(lines)).sum(0)


def _comparable(lines: Lines) -> Lines:
    """Reduce to peak and end if the sequence of operations depends on the data, so that there is no common one."""
    if len({len(line) for line in lines.values()}) == 1:
        return lines
    return {size: torch.stack([line.max(), line[-1]]) for size, line in lines.items()}


def _timeline(run: Callable[[Shape], None], shape: Shape, model: nn.Module, held_gradients: bool) -> torch.Tensor:
    for parameter in model.parameters():
        held = held_gradients and parameter.requires_grad
        parameter.grad = torch.ones_like(parameter) if held else None  # zeros would be reset to None
    with _no_collection(), track_tensor_bytes(model) as tracked, _Timeline(tracked) as line:
        run(shape)
        line.live_bytes.append(tracked.live_bytes)  # by now the last operation's temporaries are freed
    return torch.tensor(line.live_bytes, dtype=torch.float64)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection of cycles, whose timing depends on everything else in the process."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lagrange(places: Sequence[int], at: int) -> list[float]:
    """Weights of values at `places` that give the value of their polynomial at `at`."""
    weights = []
    for i, place in enumerate(places):
        weight = 1.0
        for j, other in enumerate(places):
            if i != j:
                weight *= (at - other) / (place - other)
        weights.append(weight)
    return weights


class OptimizerBytes:
    """Bytes of an optimizer's states and of its step's temporaries, counted on tensors without data."""

    def __init__(self, model: nn.Module, make: Optimizer) -> None:
        self._mode = FakeTensorMode()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with self._mode, _explained(make):
            empty = {n: torch.empty(p.shape, dtype=p.dtype, device=p.device) for n, p in trained.items()}
            self._parameters = {name: nn.Parameter(tensor) for name, tensor in empty.items()}
            self._optimizer = make(list(self._parameters.values()))
            self._give_gradients(self._parameters)
            self._optimizer.step()
        with self._mode, track_tensor_bytes(self._optimizer) as tracked:
            self._all_bytes = tracked.live_bytes

    def state_bytes(self, trained: Iterable[str]) -> int:
        """Bytes of the states of these parameters; one that never gets a gradient has none."""
        never = self._parameters.keys() - set(trained)
        states = (self._optimizer.state.get(self._parameters[name], {}) for name in never)
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        return self._all_bytes - sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def names(self) -> list[str]:
        """Names of the parameters that may be trained."""
        return list(self._parameters)

    def step_bytes(self, trained: Iterable[str]) -> int:
        """Peak bytes of a step that moves these parameters, beyond states, parameters and gradients."""
        with self._mode:
            self._give_gradients(trained)
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            with track_tensor_bytes(self._optimizer, *self._parameters.values(), *gradients) as tracked:
                before = tracked.live_bytes
                self._optimizer.step()
        return tracked.peak_bytes - before

    def _give_gradients(self, names: Iterable[str]) -> None:
        chosen = set(names)
        for name, parameter in self._parameters.items():
            parameter.grad = torch.empty_like(parameter) if name in chosen else None


@contextlib.contextmanager
def _explained(make: Optimizer) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"The optimizer made by {getattr(make, '__name__', make)!r} does not run on tensors without data, so its "
            f"memory cannot be counted ({type(error).__name__}: {error}). Pass optimizer=... a function that takes a "
            "list of parameters and returns a torch.optim.Optimizer."
        ) from error


def largest(fits: Callable[[int], bool], *, step: int = 1, most: int, guess: int | None = None) -> int:
    """The largest multiple of `step`, at most `most`, for which `fits` holds; 0 if not even one step does.

    Steps double away from a guess until the border is passed; bisection follows. `fits` must be monotone. It is called
    about O(log(most / step)) times without a guess, and about twice with a right one.
    """
    limit = most // step
    first = min(max(1, (guess or step) // step), limit)
    low, high = _bracket(lambda steps: fits(steps * step), first, limit) if limit else (0, 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _bracket(fits: Callable[[int], bool], first: int, limit: int) -> tuple[int, int]:
    """(a size that fits, a larger one that does not), in steps; 0 is assumed to fit, `limit + 1` not to."""
    stride = 1
    if fits(first):
        low = first
        while low < limit:
            higher = min(low + stride, limit)
            if not fits(higher):
                return low, higher
            low, stride = higher, 2 * stride
        return limit, limit + 1
    high = first
    while high > 1:
        lower = max(high - stride, 1)
        if fits(lower):
            return lower, high
        high, stride = lower, 2 * stride
    return 0, high
