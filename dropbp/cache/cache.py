"""Decides for each forward whether it starts at the border, runs in full, or runs both ways to compare them."""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from dropbp._torch import transforming
from dropbp.cache.files import FileStore
from dropbp.cache.fingerprint import Fingerprints
from dropbp.cache.forward import CACHES, CachedForward
from dropbp.cache.prefix import Prefix
from dropbp.cache.recurrence import Recurrence
from dropbp.cache.rows import MASK, Row, keys_of, padded_on_the_left
from dropbp.cache.skipper import (
    BlockInterfaces,
    BlockSkipper,
    CachedBlockState,
    cached_block_forward,
    compiled_blocks_through,
    stack_of,
)
from dropbp.cache.store import MemoryStore, RowState, Store
from dropbp.engine.engine import Engine
from dropbp.engine.patch import Forward, ForwardPatch
from dropbp.engine.side_outputs import CallPlan
from dropbp.inputs import argument_names
from dropbp.masks.plan import ForwardPlan
from dropbp.masks.upcoming import may_keep_at_the_end, may_keep_from_now_on
from dropbp.tensors import any_requires_grad

logger = logging.getLogger(__name__)

MEASURED = 3  # forwards that measure how long the blocks below the border take
Kind = tuple[Any, ...]


class ActivationCache:
    """The cache of one enabled model, in host memory (`where` is True) or in a folder, up to `limit` bytes.

    `refused` says why the cache is off (None: it is on), and `objections` why some forwards run without it.
    `difference` is the largest one found when a forward ran both ways, relative to the norm of a row's state.
    """

    def __init__(self, engine: Engine, where: bool | str | os.PathLike[str], limit: int | None = None) -> None:
        self.engine, self.runtime, self.model = engine, engine.runtime, engine.model
        self.prefix = Prefix(self.model, engine.structure, engine.freezes_stem)
        self.interfaces = BlockInterfaces(self.prefix.names)
        self.store: Store = MemoryStore(limit)
        if not isinstance(where, bool):
            self.store = FileStore(Path(os.fspath(where)), Fingerprints(self.prefix), limit)
        self.keys = keys_of(self.model)
        self.refused: str | None = None
        self.objections: dict[str, None] = {}
        self.difference = 0.0
        self.looked_up = self.found = self.forwards_hit = self.border = self.freed_bytes = 0
        self.saved_s = 0.0
        self._highest = 0  # the highest border so far: no state lies above it
        self._running: ContextVar[BlockSkipper | None] = ContextVar("skipper", default=None)
        self.takes_use_cache = "use_cache" in argument_names(self.model)
        self.verified: set[tuple[Kind, int | None]] = set()
        self.stream_requires_grad, self.stream_type = True, torch.float32
        self._objection_to: dict[Kind, str] = {}
        self.autocast: dict[Kind, torch.dtype | None] = {}  # what the blocks run under, by the kind of the call
        self._recurrence = Recurrence()
        self._trained = 0  # rows of training forwards that were found
        self._once = False  # whether each row is trained on once only
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self._measured: list[float] = []
        self._padding_untested = True  # whether it is still unknown if the padding to the left of a row matters
        self._patches: list[ForwardPatch] = []

    def start(self) -> None:
        """Wrap the forwards of the blocks."""
        if not self.prefix.count:
            self.refuse(f"{type(self.model).__name__} has no blocks that could be skipped")
        for place, block in enumerate(self.prefix.blocks):
            self._patches.append(
                ForwardPatch(block, "_dropbp_cache", CachedBlockState(place, self._running), cached_block_forward)
            )
        self.engine.recomputation.inspect()  # so that these wrappers do not count as changes of the blocks
        self.runtime.cached_forward = self.cached_forward

    def stop(self) -> None:
        """Remove the wrappers, and free all memory."""
        self.runtime.cached_forward = None
        for patch in reversed(self._patches):
            patch.remove()
        self._patches = []
        self.store.close()

    def report(self) -> dict[str, Any]:
        """The cache's figures as plain numbers and strings."""
        full = "the limit in bytes is reached, so no further rows are stored" if self.store.full else None
        return {
            "rows": self.store.rows,
            "bytes": self.store.nbytes,
            "looked_up": self.looked_up,
            "hits": self.found,
            "forwards_shortened": self.forwards_hit,
            "border": self.border,
            "seconds_saved": self.saved_s,
            "largest_difference": self.difference,
            "optimizer_bytes_freed": self.freed_bytes,
            "refused": self.refused,
            "objections": list(self.objections),
            "trouble": self.store.trouble or full,
        }

    def figures(self) -> dict[str, float]:
        """The figures for a trainer's log."""
        return {
            "dropbp_cache_hit_share": self.found / max(1, self.looked_up),
            "dropbp_cache_gib": self.store.nbytes / 2**30,
            "dropbp_cache_saved_s": self.saved_s,
        }

    # -- one forward

    def cached_forward(
        self, call: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any], plan: ForwardPlan
    ) -> Callable[[], Any] | None:
        """The function that runs instead of the root's forward. If that is compiled, `call` is None and it is kept."""
        if call is None:
            self._note_objection("the whole model is compiled: compile its blocks, dropbp.compile_blocks(handle)")
            return None
        uncached = functools.partial(call, *args, **kwargs)
        if hasattr(next(self.model.parameters(), None), "ds_id"):
            self.refuse("DeepSpeed ZeRO-3 moves weights in a way that hides changes to them")
        if self.refused is not None or not self._may_use(args, kwargs):
            return uncached
        observed = isinstance(plan, CallPlan) and plan.observation is not None  # inspects what dropped branches record
        border = self._border_now(plan, observed)
        kind = self._kind(call, args, kwargs)
        if border == 0 or self._note_objection(self._objection_to.get(kind) or self.prefix.objection(border)):
            return uncached
        self.store.open_border(border)
        rows = self.keys.of(args, kwargs, self._salt(kind))
        if rows is None:
            self._note_objection("an input is neither a tensor nor a number nor text")
            return uncached
        return self._chosen_run(CachedForward(self, call, args, kwargs, kind, rows, border, plan), observed)

    def _border_now(self, plan: ForwardPlan, observed: bool) -> int:
        """The border of this forward, after states and optimizer states that it makes invalid or useless are freed."""
        tensors = self.prefix.current_tensors()
        border = self._border(self._frozen_border(plan), 0 if observed else plan.detached)
        self._highest = max(self._highest, border)
        changed = self.prefix.changed(tensors, self._highest)
        if changed is not None:
            self.store.drop_above(changed)
        if border > self.border:
            self._free_optimizer_states(border)
        self.border = border
        return border

    def _chosen_run(self, forward: CachedForward, observed: bool) -> Callable[[], Any]:
        """The way to run this forward: from the border if all its rows are known."""
        self.looked_up += len(forward.rows)
        if self._padding_untested and padded_on_the_left(forward.kwargs.get(MASK)):
            self._padding_untested = False
            forward.try_other_padding()
            self._name_rows(forward)
        if forward.kind not in self.autocast:
            return forward.run_full
        states = self._look_up(forward)
        if len(states) < len(forward.rows) or observed or not self.interfaces.knows(forward.border):
            return forward.run_full
        return functools.partial(forward.run_from_border, states)

    def _name_rows(self, forward: CachedForward) -> None:
        forward.rows = self.keys.of(forward.args, forward.kwargs, self._salt(forward.kind)) or forward.rows

    def _kind(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
        """A key for forwards whose outputs come from the same places: what is called, and the outputs it selects."""
        module = getattr(call, "args", (self.model,))[0]
        return (type(module).__name__, *self.engine.calls.key(args, kwargs), self.prefix.modes(), self.autocast_now())

    def note_autocast(self, forward: CachedForward) -> None:
        """Note the autocast that the blocks of a call run under, and look its rows up.

        A wrapper around the forward, such as accelerate's, may set another than the caller's, and no state of one
        precision serves the other. So the first forward of each kind of call runs in full.
        """
        if forward.kind not in self.autocast:
            self.autocast[forward.kind] = self.autocast_now()
            self._name_rows(forward)
            self._look_up(forward)

    def autocast_now(self) -> torch.dtype | None:
        device = next(self.model.parameters()).device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def run_with_skipper(self, skipper: BlockSkipper, forward: Callable[[], Any]) -> Any:
        """Run a forward with this skipper."""
        token = self._running.set(skipper)
        try:
            with compiled_blocks_through(self.prefix.blocks, skipper):
                return forward()
        finally:
            self._running.reset(token)

    def _may_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        excluded = transforming() or any_requires_grad(args, kwargs) or (self._once and self._trains())
        return not excluded and not self._wants_caches(kwargs)

    def _wants_caches(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the key-value caches of all layers are wanted: for generation, or because the call says so."""
        if kwargs.get("use_cache") or any(kwargs.get(name) is not None for name in CACHES):
            return True
        loss = kwargs.get("labels") is not None or torch.is_grad_enabled()
        return self.takes_use_cache and kwargs.get("use_cache") is None and not loss

    def _frozen_border(self, plan: ForwardPlan) -> int:
        """The highest border below which this forward trains nothing."""
        if not torch.is_grad_enabled():
            return self.prefix.count
        every = (1 << len(self.engine.structure.branches)) - 1
        return self.prefix.frozen_border(plan.trained & every, plan.stem_frozen)

    def _border(self, frozen_border: int, detached: int) -> int:
        """The border at which states are stored now: nothing below it trains in this forward or later; else 0."""
        schedule, freezes_stem = self.engine.schedule, self.engine.freezes_stem
        frozen = self.prefix.frozen_border(may_keep_from_now_on(schedule), freezes_stem)
        if not frozen and not self.prefix.frozen_border(may_keep_at_the_end(schedule), freezes_stem):
            self._note_objection(
                "any step of this run may train the lowest block. Pass steps=... to enable, keep the default masks and "
                "rates, raise drop_rate, or freeze the lower blocks"
            )
        border = min(frozen, self.interfaces.limit, self.prefix.count)
        # the highest border below which no branch lies whose inside an output depends on
        needs = enumerate(self.engine.structure.blocks.values())
        below = next((place for place, need in needs if need & detached), self.prefix.count)
        if below < border <= frozen_border:
            self._note_objection(
                f"an output was asked for, such as hidden_states, that {self.prefix.names[below]} produces"
            )
        return border if border <= min(frozen_border, below) else 0

    def _note_objection(self, reason: str | None) -> bool:
        """Warn once of each reason; return whether there is one."""
        if reason is not None and reason not in self.objections:
            self.objections[reason] = None
            logger.warning("Forwards run without the activation cache, because %s.", reason)
        return reason is not None

    def _salt(self, kind: Kind) -> str:
        name, asked, changed, modes, autocast = kind
        autocast = self.autocast.get(kind, autocast)
        return f"{name}{sorted(map(repr, asked))}{sorted(map(repr, changed))}{modes.hex()}{autocast}"

    def _look_up(self, forward: CachedForward) -> dict[int, RowState]:
        """The states of the rows, if all are stored; else empty. Counts them."""
        rows, store = forward.rows, self.store
        if store.full:
            self._note_objection(
                f"its limit of {store.limit} bytes is reached: only batches whose rows are all stored start at the "
                "border. Raise activation_cache_limit, or use smaller batches"
            )
        stored = sum(store.border(row.key) > 0 for row in rows)
        states = self._states(rows, self._frozen_border(forward.plan)) if stored == len(rows) else {}
        self.found += len(states)
        if self._trains():
            self._trained += len(states)
            schedule = self.engine.schedule
            share = None if schedule.config.steps is None else schedule.pace.now
            reason = self._recurrence.note(len(rows), stored, len(states), share, store.full)
            if reason is not None:
                self._stop_in_training(reason)
        return states

    def _trains(self) -> bool:
        return self.model.training and torch.is_grad_enabled()

    def _states(self, rows: Sequence[Row], frozen_border: int) -> dict[int, RowState]:
        """The states of the rows, if all are stored; else empty."""
        if not all(0 < self.store.border(row.key) <= frozen_border for row in rows):
            return {}
        if not all(row.padding is None or self.store.border(row.at(self.store.border(row.key))) for row in rows):
            return {}
        found = {place: self.store.get(row.key) for place, row in enumerate(rows)}
        states = {place: state for place, state in found.items() if state is not None}
        return states if len(states) == len(rows) else {}

    def padding(self, rows: Sequence[Row], states: Mapping[int, RowState]) -> dict[int, RowState]:
        """The states of the padding to the left of these rows, at the border where the rows enter."""
        wanted = {place: rows[place].at(state.border) for place, state in states.items() if rows[place].padding}
        found = {place: self.store.get(key) for place, key in wanted.items()}
        return {place: state for place, state in found.items() if state is not None}

    def note_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Free this optimizer's states of parameters that will never train again, as the border moves up."""
        self._optimizer = weakref.ref(optimizer)

    def _free_optimizer_states(self, border: int) -> None:
        """Free optimizer states. If such a parameter did train again, its state would start from zero."""
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is not None and not type(optimizer).__module__.startswith("deepspeed"):  # one state for many
            self.freed_bytes += self.prefix.free_states(optimizer, border)

    # -- observations

    def refuse(self, reason: str) -> None:
        """Switch the cache off for the rest of the run."""
        if self.refused is None:
            self.refused = reason
            self.store.close()
            logger.warning("The activation cache is switched off, because %s.", reason)

    def limit_border(self, kind: Kind, border: int, leak: str) -> None:
        """Something besides the stream crosses this border, so stay below the stack of blocks it lies in, if any.

        This way an encoder can still be cached although every block of the decoder reads its last state.
        """
        stack = stack_of(self.prefix.names[border - 1])
        below = next((i for i in reversed(range(border)) if stack_of(self.prefix.names[i]) != stack), 0)
        reason = f"the blocks below {self._named(border)} produce something besides the residual stream: {leak}"
        if below:
            self.interfaces.limit_border(below, reason)
            self.store.drop_above(below)
        else:
            self._objection_to[kind] = reason
            self._note_objection(reason)

    def object_to_randomness(self, kind: Kind, place: int) -> None:
        """A block, or a module that feeds the first one, draws random numbers in training."""
        where = self.prefix.random_module(place)
        self._objection_to[kind] = reason = (
            f"{where} draws random numbers in training, so a row's state differs each time. Switch off dropout below "
            "the part of the model that trains (lora_dropout=0, attention_dropout=0, and the like)"
        )
        self._note_objection(reason)

    def end_epoch(self) -> None:
        """Note that every row was seen once more."""
        reason = self._recurrence.end_epoch(self.store.full)
        if reason is not None and not self._objection_to:
            self._stop_in_training(reason)

    def _stop_in_training(self, reason: str) -> None:
        """Store no more rows of training forwards, and free the states. Evaluations still use theirs."""
        advice = f"{reason}. Pack rows once, before training, or do not pack"
        if isinstance(self.store, FileStore) and not self._recurrence.epochs:
            self._note_objection(f"{reason}. Rows are still stored for later runs")
        elif self.found == self._trained:
            self.refuse(advice)
        else:
            self._note_objection(f"{advice}. Evaluations still use it")
            self.store.drop_above(0)
            self._once = True

    def note_full(self, forward: CachedForward, border: int, stream: torch.Tensor) -> None:
        """Note that a forward run in full has reached the border."""
        self.stream_type = stream.dtype
        if torch.is_grad_enabled() and not forward.plan.truncated:
            self.stream_requires_grad = stream.requires_grad
        if len(self._measured) < MEASURED:
            self.engine.device.synchronize()
            self._measured.append((time.perf_counter() - forward.begin_s) / (border * stream[..., 0].numel()))

    def note_hit(self, forward: CachedForward, start: int, positions: int) -> None:
        """Note that a forward started at a border."""
        self.forwards_hit += 1
        self.saved_s += min(self._measured, default=0.0) * start * positions

    @property
    def stores(self) -> bool:
        """Whether states are being stored."""
        return self.refused is None and not self.store.full and self.store.trouble is None

    def _named(self, border: int) -> str:
        return self.prefix.names[border] if border < self.prefix.count else "the last"
