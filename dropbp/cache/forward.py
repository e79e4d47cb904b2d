"""One forward of the root with the cache: in full, shortened, or both ways to compare them."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dropbp.cache.rows import LABELS, MASK, Row
from dropbp.cache.skipper import BlockSkipper, CacheMismatchError, has_nan
from dropbp.cache.store import RowState
from dropbp.device import fork_rng
from dropbp.engine.patch import Forward
from dropbp.masks.plan import ForwardPlan
from dropbp.tensors import buffers_restored, outputs_by_key

if TYPE_CHECKING:
    from dropbp.cache.cache import ActivationCache, Kind

CACHES = ("past_key_values", "cache_params", "past_key_value", "mems", "state", "layer_past", "past")
# Relative to the norm of a row's state: rounding errors after many layers, with other rows in the batch.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


class CachedForward:
    """One call of the root; observations of it hold for its `kind`. States of its `rows` are stored at `border`."""

    def __init__(
        self,
        cache: ActivationCache,
        call: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        kind: Kind,
        rows: Sequence[Row],
        border: int,
        plan: ForwardPlan,
    ) -> None:
        self.cache, self.call, self.args, self.kwargs = cache, call, args, kwargs
        self.kind, self.rows, self.border, self.plan = kind, rows, border, plan
        self._seen = kind, len(rows) > 1  # rows seen alone must still be checked together with others
        self.begin_s = time.perf_counter()
        self._worst = 0.0

    def run_full(self, states: Mapping[int, RowState] | None = None) -> Any:
        """Run all blocks, and store states missing at the border. Compare the given states with the results."""
        cache = self.cache
        watch = _RandomnessCheck(cache, self.kind) if cache.model.training else None
        skipper = BlockSkipper(
            cache.interfaces,
            self.rows,
            states,
            store=functools.partial(self._store, watch),
            store_at=self.border,
            compare=self._compare,
            begin=functools.partial(cache.note_autocast, self),
            watch=watch,
        )
        outputs = cache.run_with_skipper(skipper, functools.partial(self.call, *self.args, **self.kwargs))
        cache.prefix.attributes.leave_out_changed()
        if skipper.trouble is not None:
            cache.refuse(skipper.trouble)
        return outputs

    def run_from_border(self, states: Mapping[int, RowState]) -> Any:
        """Skip the blocks below the border. The first time, run both ways."""
        cache = self.cache
        skipper = self._skipper(states)
        if (self._seen, None) not in cache.verified:
            return self._run_both_ways(states)
        checking = (self._seen, skipper.start) not in cache.verified
        try:
            outputs = cache.run_with_skipper(skipper, self._call_without_caches())
            skipper.check_reached()
        except CacheMismatchError as mismatch:
            cache.refuse(str(mismatch))
            return self.call(*self.args, **self.kwargs)
        if checking and has_nan(outputs):
            return self._run_both_ways(states)
        cache.verified.add((self._seen, skipper.start))
        cache.note_hit(self, skipper.start, skipper.positions)
        return outputs

    def try_other_padding(self) -> None:
        """Find out whether states depend on the amount of padding to the left: add one column of it, and compare.

        They do with learned absolute positions; with rotary ones, only distances matter.
        """
        cache, keys = self.cache, self.cache.keys
        call = functools.partial(self.call, *self.args)
        plain = {name: value for name, value in self.kwargs.items() if name not in LABELS}
        other = {name: _padded(name, value, self.kwargs[MASK]) for name, value in plain.items()}
        seen: list[torch.Tensor] = []

        def begin() -> None:
            cache.autocast.setdefault(self.kind, cache.autocast_now())

        def store(border: int, stream: torch.Tensor) -> None:
            seen.append(stream)

        with fork_rng(cache.model), buffers_restored(cache.model):
            for kwargs in (plain, other):
                skipper = BlockSkipper(cache.interfaces, self.rows, store=store, store_at=self.border, begin=begin)
                with contextlib.suppress(Exception):  # for example more positions than the model has
                    self._run_aside(skipper, functools.partial(call, **kwargs))
        if len(seen) != 2 or seen[1].shape[1] != seen[0].shape[1] + 1:
            return
        masks = self.kwargs[MASK].cpu()
        keys.offset_matters = not all(
            _distance(one[mask != 0], more[1:][mask != 0]) <= self._tolerance() and self._alike(one, more, mask)
            for one, more, mask in zip(*seen, masks, strict=True)
        )

    def _alike(self, one: torch.Tensor, more: torch.Tensor, mask: torch.Tensor) -> bool:
        """Whether all padding to the left of a row has the same state."""
        first = int(mask.nonzero()[0])
        return all(_distance(more[first], x) <= self._tolerance() for x in (*one[max(0, first - 1) : first], more[0]))

    def _skipper(self, states: Mapping[int, RowState]) -> BlockSkipper:
        moves = any(state.border < self.border for state in states.values()) and self.cache.stores
        store = functools.partial(self._store, None) if moves else None
        return BlockSkipper(
            self.cache.interfaces,
            self.rows,
            states,
            self.cache.padding(self.rows, states),
            store=store,
            store_at=self.border if moves else 0,
            requires_grad=self.cache.stream_requires_grad and not self.plan.truncated,
        )

    def _call_without_caches(self) -> Callable[[], Any]:
        """Make no key-value caches, since they would lack the layers that do not run."""
        kwargs = {**self.kwargs, "use_cache": False} if self.cache.takes_use_cache else self.kwargs
        return functools.partial(self.call, *self.args, **kwargs)

    def _compare_alone(self, states: Mapping[int, RowState]) -> None:
        """Run the last row alone, because the other rows may be the same as when its state was stored."""
        count = len(self.rows)
        args, kwargs = (_last_row(value, count) for value in (self.args, {**self.kwargs}))
        kwargs = {name: value for name, value in kwargs.items() if name not in LABELS}
        row = self.rows[-1:]
        alone = CachedForward(self.cache, self.call, args, kwargs, self.kind, row, self.border, self.plan)
        skipper = BlockSkipper(self.cache.interfaces, row, {0: states[count - 1]}, compare=alone._compare)
        with contextlib.suppress(Exception):  # a model may not accept its other inputs for one row
            self._run_aside(skipper, functools.partial(self.call, *args, **kwargs))
        self._worst = max(self._worst, alone._worst)

    def _run_aside(self, skipper: BlockSkipper, call: Callable[[], Any]) -> Any:
        return self.cache.runtime.run_no_grad(functools.partial(self.cache.run_with_skipper, skipper, call))

    def _run_both_ways(self, states: Mapping[int, RowState]) -> Any:
        """Run shortened, with NaN from the blocks below, then in full with the same random state; compare."""
        cache = self.cache
        skipper = BlockSkipper(cache.interfaces, self.rows, states, cache.padding(self.rows, states), seeks_leaks=True)
        short: dict[str, Any] | None = None
        with fork_rng(cache.model), buffers_restored(cache.model):
            try:
                short = _figures(self._run_aside(skipper, self._call_without_caches()))
            except Exception as error:  # noqa: BLE001 - a model may raise anything if its blocks return NaN
                skipper.leak = skipper.leak or f"a shortened forward raises {type(error).__name__} ({error})"
            if len(self.rows) > 1:
                self._compare_alone(states)
        outputs = self.run_full(states)
        self._compare_outputs(skipper, short, _figures(outputs))
        return outputs

    def _compare_outputs(self, skipper: BlockSkipper, short: Mapping[str, Any] | None, full: Mapping[str, Any]) -> None:
        cache = self.cache
        cache.difference = max(cache.difference, self._worst)
        allowed = self._tolerance()
        if self._worst > allowed:
            cache.refuse(
                f"a forward that started at {cache.prefix.names[skipper.start - 1]} differed by {self._worst:.2g} of "
                f"the stream's norm from one that ran in full, but rounding explains at most {allowed:.2g}: the blocks "
                "below are not deterministic, or mix the rows of a batch"
            )
            return
        lost = [name for name, value in full.items() if short is None or not _equal(short.get(name), value, allowed)]
        if lost:
            cache.limit_border(
                self.kind, skipper.start, skipper.leak or f"its output {lost[0].split()[0]} comes from there"
            )
            return
        cache.verified |= {(self._seen, None), (self._seen, skipper.start)}

    def _tolerance(self) -> float:
        kinds = {self.cache.stream_type, self.cache.autocast.get(self.kind) or self.cache.stream_type}
        kinds |= {p.dtype for p in self.cache.model.parameters() if p.dtype in TOLERANCES}
        return max(TOLERANCES.get(kind, 0.1) for kind in kinds)

    def _compare(self, row: int, state: RowState, stream: torch.Tensor) -> None:
        real = self.rows[row].real
        own = stream[row] if real is None else stream[row, real]
        if own.shape != state.values.shape:
            self._worst = float("inf")
            return
        self._worst = max(self._worst, _distance(own, state.values.to(own.device)))
        if real is not None:
            for padding in self.cache.padding(self.rows, {row: state}).values():
                self._worst = max(self._worst, _distance(stream[row, real.start - 1], padding.values.to(own.device)))

    def _store(self, watch: _RandomnessCheck | None, border: int, stream: torch.Tensor) -> None:
        cache = self.cache
        if watch is not None and watch.found:
            return
        if stream.shape[:1] != (len(self.rows),):
            cache.limit_border(
                self.kind, border, f"the stream after {cache.prefix.names[border - 1]} has no rows of its own"
            )
            return
        spans = [row.real for row in self.rows if row.real is not None]
        if spans and not self._fits(stream):
            cache.keys.trims = False  # from the next forward on, whole rows are hashed and stored
            return
        cache.note_full(self, border, stream)
        for place, row in enumerate(self.rows):
            if cache.store.border(row.key) < border:
                _put(cache, row.key, border, stream[place] if row.real is None else stream[place, row.real])
            if row.padding is not None and row.real is not None and not cache.store.border(row.at(border)):
                _put(cache, row.at(border), border, stream[place, row.real.start - 1])

    def _fits(self, stream: torch.Tensor) -> bool:
        """Whether the stream has one position for each position of the mask."""
        mask = self.kwargs.get("attention_mask")
        return stream.dim() == 3 and (mask is None or stream.shape[1] == mask.shape[1])


def _put(cache: ActivationCache, key: bytes, border: int, own: torch.Tensor) -> None:
    if not cache.stores:
        return
    with torch.inference_mode(False), torch.no_grad():
        values = own.detach().to("cpu", copy=True).contiguous()
        if bool(values.isfinite().all()):
            cache.store.put(key, RowState(border, values))


class _RandomnessCheck:
    """Checks whether a block below the border draws random numbers."""

    def __init__(self, cache: ActivationCache, kind: Kind) -> None:
        self.cache, self.kind, self.found = cache, kind, False
        self._before = self._states()

    def __call__(self, place: int) -> None:
        """Check after a block has run; the blocks below it come first."""
        if self.found or place >= self.cache.border:
            return
        now = self._states()
        if not all(map(torch.equal, self._before, now)):
            self.found = True
            self.cache.object_to_randomness(self.kind, place)

    def _states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), self.cache.engine.device.generator_state()]


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance relative to the norm of the first tensor."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / one.norm().clamp(min=1e-30))


def _padded(name: str, value: Any, mask: torch.Tensor) -> Any:
    """The argument with one more position of padding on the left."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[1] != mask.shape[1]:
        return value
    first = torch.zeros_like(value[:, :1]) if name == MASK else value[:, :1]
    return torch.cat([first, value], dim=1)


def _last_row(value: Any, rows: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[-1:] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {name: _last_row(item, rows) for name, item in value.items()}
    return tuple(_last_row(item, rows) for item in value) if type(value) is tuple else value


def _figures(outputs: Any) -> dict[str, Any]:
    """The values by which two runs are compared: scalar outputs, and whether each other output contains NaN."""
    found: dict[str, Any] = {}
    for name, tensor in outputs_by_key(outputs):
        if name not in CACHES:
            own = float(tensor.detach()) if tensor.numel() == 1 else bool(tensor.isnan().any())
            found[f"{name} {len(found)}"] = own
    return found


def _equal(short: Any, full: Any, allowed: float) -> bool:
    if isinstance(full, bool):
        return full or not short
    return math.isnan(full) or (short is not None and abs(short - full) <= allowed * max(abs(full), 1.0))
