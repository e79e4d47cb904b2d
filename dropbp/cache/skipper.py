"""One forward of the model with the cache: which blocks are skipped, where rows enter, which states are stored.

A skipped block returns NaN in the form of its output, so that any other use of its output shows. A row takes its stored
state after the block at its border. The state replaces that block's output and not the next block's input: the next
block may be checkpointed, and its recomputation would use the original input.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from dropbp.cache.rows import Row
from dropbp.cache.store import RowState
from dropbp.engine.patch import Forward, WrapperState, named_forward
from dropbp.engine.runtime import is_compiling
from dropbp.tensors import tensors_in

Watch = Callable[[int], None]


class CacheMismatchError(Exception):
    """A forward cannot continue with the cache and runs again without it."""


class BlockInterfaces:
    """Where each block takes the stream and where it returns it, as seen in forwards that ran in full."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._known: dict[int, tuple[int | str, int | None, tuple[bool, ...]]] = {}
        self.limit, self.reason = len(names), ""

    def knows(self, border: int) -> bool:
        """Whether the interfaces of all blocks below a border are known."""
        return all(place in self._known for place in range(border))

    def learn(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Inspect one call of a block. A block that cannot be skipped limits the border."""
        if place in self._known or place >= self.limit:
            return
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        parts = list(output) if type(output) is tuple else [output]
        if not all(part is None or (type(part) is torch.Tensor and part.is_floating_point()) for part in parts):
            self.limit_border(place, f"{self.names[place]} returns more than the residual stream")
            return
        pairs = ((key, i) for i, part in enumerate(parts) for key, value in given if _alike(value, part))
        input_stream, where = next(pairs, (None, 0))
        if input_stream is None:
            self.limit_border(place, f"{self.names[place]} takes a stream of another shape or type than it returns")
            return
        known = tuple(part is not None for part in parts)
        self._known[place] = input_stream, where if type(output) is tuple else None, known

    def limit_border(self, limit: int, reason: str) -> None:
        """Limit the border."""
        if limit < self.limit:
            self.limit, self.reason = limit, reason

    def input_stream(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The stream that a block receives."""
        key, _, _ = self._known[place]
        value = kwargs.get(key) if isinstance(key, str) else (args[key] if key < len(args) else None)
        if not isinstance(value, torch.Tensor):
            raise CacheMismatchError(f"{self.names[place]} was called in another way than before")
        return value

    def nan_stream(self, place: int, stream: torch.Tensor) -> torch.Tensor:
        """NaN in place of the stream: created by the first block of a stack, passed on by the others."""
        first = place == 0 or stack_of(self.names[place]) != stack_of(self.names[place - 1])
        return torch.full_like(stream, torch.nan) if first else stream

    def output_stream(self, place: int, output: Any) -> torch.Tensor:
        """The stream in a block's output."""
        where = self._known[place][1]
        stream = output if where is None else output[where]
        if type(stream) is not torch.Tensor:
            raise CacheMismatchError(f"{self.names[place]} returned something else than before")
        return stream

    def replaced(self, place: int, output: Any, stream: torch.Tensor) -> Any:
        """A block's output with another stream."""
        where = self._known[place][1]
        return stream if where is None else (*output[:where], stream, *output[where + 1 :])

    def with_stream(self, place: int, stream: torch.Tensor) -> Any:
        """A block's output that holds this stream, with NaN for everything else it returns, such as attention maps."""
        _, where, tensors = self._known[place]
        if where is None:
            return stream
        other = stream.new_full((), torch.nan) if sum(tensors) > 1 else None
        return tuple(stream if i == where else other if there else None for i, there in enumerate(tensors))


def stack_of(name: str) -> str:
    """The path of the container of a block and its neighbours."""
    return name.rpartition(".")[0]


def _alike(value: Any, stream: Any) -> bool:
    if type(value) is not torch.Tensor or stream is None:
        return False
    return bool(value.shape == stream.shape and value.dtype == stream.dtype)


class BlockSkipper:
    """Runs or skips each block in one forward, in which `rows` enter with their `states`, each at its border; without
    states it runs in full. `padding` are the states of the padding to the left of rows.

    `store` is called with the border `store_at` (0: none) and the stream there. `compare` is called with a row, its
    state and the stream where the row would enter; rows then do not enter. `seeks_leaks` checks what comes out of
    skipped blocks besides the stream. `requires_grad` is that of the stream at the start. `begin` is called before the
    first block runs, `watch` with the index of each block that has run, and with -1 before the first.
    """

    def __init__(
        self,
        interfaces: BlockInterfaces,
        rows: Sequence[Row],
        states: Mapping[int, RowState] | None = None,
        padding: Mapping[int, RowState] | None = None,
        *,
        store: Callable[[int, torch.Tensor], None] | None = None,
        store_at: int = 0,
        compare: Callable[[int, RowState, torch.Tensor], None] | None = None,
        seeks_leaks: bool = False,
        requires_grad: bool = False,
        begin: Callable[[], None] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.interfaces, self.rows = interfaces, rows
        self.states, self.padding = dict(states or {}), dict(padding or {})
        self.start = min((state.border for state in self.states.values()), default=0) if compare is None else 0
        self.store, self.store_at, self.compare = store, store_at, compare
        self.seeks_leaks, self.requires_grad, self.begin, self.watch = seeks_leaks, requires_grad, begin, watch
        self.next = 0
        self.trouble: str | None = None
        self.leak = ""
        self.positions = 0

    def block(self, place: int, forward: Callable[[], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output of a block, run or skipped."""
        self._check_order(place)
        border = place + 1
        if border <= self.start:
            stream = self.interfaces.input_stream(place, args, kwargs)
            if border < self.start:
                return self.interfaces.with_stream(place, self.interfaces.nan_stream(place, stream))
            self.positions = stream[..., 0].numel()
            stream = self._with_states(border, torch.zeros_like(stream), self.requires_grad)
            return self.interfaces.with_stream(place, stream)
        if self.begin is not None and not place:
            self.begin()
        if self.watch is not None and not place:
            self.watch(-1)
        if self.seeks_leaks and not self.leak:
            self._look_for_leaks(place, args, kwargs)
        output = forward()
        if self.trouble is not None:
            return output
        return self._after(place, args, kwargs, output)

    def check_reached(self) -> None:
        """Raises CacheMismatchError if the forward ended below the border, as in an early exit: its outputs are NaN."""
        if self.next < self.start:
            last = self.interfaces.names[self.start - 1]
            raise CacheMismatchError(f"a forward ended before {last}, in an early exit")

    def _check_order(self, place: int) -> None:
        if place != self.next:
            self.trouble = f"{self.interfaces.names[place]} runs more than once in a forward, or not in its turn"
            if self.start:
                raise CacheMismatchError(self.trouble)
        self.next = place + 1

    def _after(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        border = place + 1
        if not self.start:
            self.interfaces.learn(place, args, kwargs, output)
        if self.watch is not None:
            self.watch(place)
        entering = {row: state for row, state in self.states.items() if state.border == border}
        if not (entering or border == self.store_at) or border > self.interfaces.limit:
            return output
        stream = self.interfaces.output_stream(place, output)
        if self.compare is not None:
            for row, state in entering.items():
                self.compare(row, state, stream)
        elif entering:
            stream = self._with_states(border, stream.detach().clone(), stream.requires_grad)
            output = self.interfaces.replaced(place, output, stream)
        if border == self.store_at and self.store is not None:
            self.store(border, stream)
        return output

    def _with_states(self, border: int, stream: torch.Tensor, requires_grad: bool) -> torch.Tensor:
        """The stream, with the states of the rows that enter here; padding is zero."""
        with torch.no_grad():
            for row, state in self.states.items():
                if state.border != border:
                    continue
                real = self.rows[row].real
                if real is None:
                    _copy_state(stream[row], state)
                    continue
                stream[row].zero_()
                _copy_state(stream[row, real], state)
                if row in self.padding:
                    _copy_state(stream[row, real.start - 1], self.padding[row])
        return stream.requires_grad_(requires_grad and torch.is_grad_enabled())

    def _look_for_leaks(self, place: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        given = {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}
        stream = self.interfaces.input_stream(place, args, kwargs) if self.interfaces.knows(place + 1) else None
        for name, value in given.items():
            if value is not stream and has_nan(value):
                self.leak = f"{self.interfaces.names[place]} is given {name}"
                return


def _copy_state(own: torch.Tensor, state: RowState) -> None:
    if own.shape != state.values.shape or own.dtype != state.values.dtype:
        raise CacheMismatchError("a stored state has another shape or type than the stream")
    own.copy_(state.values, non_blocking=True)


def has_nan(value: Any) -> bool:
    """Whether a value contains NaN."""
    return any(t.is_floating_point() and bool(t.isnan().any()) for t in tensors_in(value))


class CachedBlockState(WrapperState):
    """A block's index, and access to the skipper of the running forward."""

    def __init__(self, place: int, running: ContextVar[BlockSkipper | None]) -> None:
        self.place, self.running = place, running.get


def cached_block_forward(original: Forward) -> Forward:
    """Wrap a block: the skipper of the running forward decides what it returns."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: CachedBlockState | None = self._dropbp_cache
        if state is None or state.original is not original or is_compiling():
            return original(self, *args, **kwargs)
        skipper = state.running()
        if skipper is None:
            return original(self, *args, **kwargs)
        return skipper.block(state.place, functools.partial(original, self, *args, **kwargs), args, kwargs)

    return named_forward(forward)


@contextlib.contextmanager
def compiled_blocks_through(blocks: Sequence[nn.Module], skipper: BlockSkipper) -> Any:
    """Route calls of separately compiled blocks through the skipper, which calls the compiled code."""
    calls = [(place, block, block._compiled_call_impl) for place, block in enumerate(blocks)]
    compiled = [(place, block, call) for place, block, call in calls if call is not None]
    try:
        for place, block, call in compiled:
            block._compiled_call_impl = _through_skipper(skipper, place, call)
        yield
    finally:
        for _, block, call in compiled:
            block._compiled_call_impl = call


def _through_skipper(skipper: BlockSkipper, place: int, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return skipper.block(place, functools.partial(call, *args, **kwargs), args, kwargs)

    return called
