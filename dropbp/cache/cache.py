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
from torch import nn

from dropbp._torch import transforming
from dropbp.cache.files import FileStore
from dropbp.cache.fingerprint import Fingerprints
from dropbp.cache.forward import CACHES, CachedForward
from dropbp.cache.prefix import Prefix
from dropbp.cache.rows import MASK, Keys, Row
from dropbp.cache.skipper import (
    BlockInterfaces,
    BlockSkipper,
    CachedBlockState,
    cached_block_forward,
    run_with_skipper,
    stack_of,
)
from dropbp.cache.store import MemoryStore, RowState, Store
from dropbp.engine.engine import Engine
from dropbp.engine.patch import Forward, ForwardPatch
from dropbp.engine.side_outputs import CallPlan
from dropbp.inputs import argument_names
from dropbp.masks.budget import may_still_be_kept
from dropbp.masks.plan import ForwardPlan
from dropbp.tensors import any_requires_grad, tensors_in

logger = logging.getLogger(__name__)

MEASURED = 3  # forwards that measure how long the blocks below the border take
Kind = tuple[Any, ...]


class ActivationCache:
    """The cache of one enabled model.

    Args:
        engine: the engine of the model; its schedule tells what will still train.
        where: True (host memory), or a folder.
        limit: bytes that may be stored; None: a share of the free memory or disk space.

    Attributes:
        refused: why the cache is off; None while it is on.
        objections: why some forwards run without it.
        difference: the largest difference found when a forward ran both ways, relative to the norm of a row's state.
    """

    def __init__(self, engine: Engine, where: bool | str | os.PathLike[str], limit: int | None = None) -> None:
        self.engine, self.runtime, self.model = engine, engine.runtime, engine.model
        self.prefix = Prefix(self.model, engine.structure, engine.freezes_stem)
        self.interfaces = BlockInterfaces(self.prefix.names)
        self.store: Store = MemoryStore(limit)
        if not isinstance(where, bool):
            self.store = FileStore(Path(os.fspath(where)), Fingerprints(self.prefix), limit)
        self.keys = Keys(argument_names(self.model), _reads_labels(self.model), _length_matters(self.model))
        self.refused: str | None = None
        self.objections: dict[str, None] = {}
        self.difference = 0.0
        self.looked_up = self.found = self.forwards_hit = self.border = 0
        self._highest = 0  # the highest border so far: no state lies above it
        self.saved_s = 0.0
        self._running: ContextVar[BlockSkipper | None] = ContextVar("skipper", default=None)
        self.takes_use_cache = "use_cache" in argument_names(self.model)
        self.verified: set[tuple[Kind, int | None]] = set()
        self.stream_requires_grad, self.stream_type = True, torch.float32
        self._objection_to: dict[Kind, str] = {}
        self._epochs, self._at_epoch = 0, (0, 0)
        self._optimizer: weakref.ref[torch.optim.Optimizer] | None = None
        self.freed_bytes = 0
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
            "trouble": self._trouble(),
        }

    def _trouble(self) -> str | None:
        full = "the limit in bytes is reached, so no further rows are stored" if self.store.full else None
        return self.store.trouble or full

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
            self._note_objection(
                "the whole model is compiled: compile its blocks instead, dropbp.compile_blocks(handle)"
            )
            return None
        whole = functools.partial(call, *args, **kwargs)
        if hasattr(next(self.model.parameters(), None), "ds_id"):
            self.refuse("DeepSpeed ZeRO-3 moves weights in a way that hides changes to them")
        if self.refused is not None or not self._may_use(args, kwargs):
            return whole
        tensors = self.prefix.current_tensors()
        frozen_border = self._frozen_border(plan)
        observed = isinstance(plan, CallPlan) and plan.observation is not None  # inspects what dropped branches record
        border = self._border(frozen_border, 0 if observed else plan.detached)
        self._highest = max(self._highest, border)
        changed = self.prefix.changed(tensors, self._highest)
        if changed is not None:
            self.store.drop_above(changed)
        if border > self.border:
            self._free_optimizer_states(border)
        self.border = border
        kind = self._kind(call, args, kwargs)
        if border == 0 or self._has_objection(border, kind):
            return whole
        self.store.open_border(border)
        rows = self.keys.of(args, kwargs, self._salt(kind))
        if rows is None:
            self._note_objection("an input is neither a tensor nor a number nor text")
            return whole
        self.looked_up += len(rows)
        forward = CachedForward(self, call, args, kwargs, kind, rows, border, plan)
        if self._padding_untested and _padded_on_the_left(kwargs.get(MASK)):
            self._padding_untested = False
            forward.try_other_padding()
            rows = forward.rows = self.keys.of(args, kwargs, self._salt(kind)) or rows
        states = self._states(rows, frozen_border)
        self.found += len(states)
        if len(states) < len(rows) or observed or not self.interfaces.knows(border):
            return forward.run_full
        return functools.partial(forward.run_from_border, states)

    def _kind(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
        """A key for forwards whose outputs come from the same places: what is called, and what is asked for."""
        module = getattr(call, "args", (self.model,))[0]
        return (type(module).__name__, *self.engine.calls.key(args, kwargs), self.prefix.modes())

    def run_with_skipper(self, skipper: BlockSkipper, forward: Callable[[], Any]) -> Any:
        """Run a forward with this skipper."""
        return run_with_skipper(self._running, skipper, self.prefix.blocks, forward)

    def _may_use(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        if transforming() or any_requires_grad(args, kwargs):
            return False
        return not self._wants_caches(kwargs)

    def _wants_caches(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the key-value caches of all layers are wanted: in generation, or because the call says so."""
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

    def _below(self, branches: int) -> int:
        """The highest border below which none of these branches lies, because an output depends on their inside."""
        needs = self.engine.structure.blocks.values()
        return next((place for place, need in enumerate(needs) if need & branches), self.prefix.count)

    def _border(self, frozen_border: int, detached: int) -> int:
        """The border at which states are stored now: nothing below it trains in this forward or later; else 0."""
        frozen = self.prefix.frozen_border(may_still_be_kept(self.engine.schedule), self.engine.freezes_stem)
        border = min(frozen, self.interfaces.limit, self.prefix.count)
        below = self._below(detached)
        if below < border <= frozen_border:
            self._note_objection(
                f"an output was asked for, such as hidden_states, that {self.prefix.names[below]} produces"
            )
        return border if border <= min(frozen_border, below) else 0

    def _has_objection(self, border: int, kind: Kind) -> bool:
        reason = self._objection_to.get(kind) or self.prefix.objection(border)
        if reason is not None:
            self._note_objection(reason)
        return reason is not None

    def _note_objection(self, reason: str) -> None:
        if reason not in self.objections:
            self.objections[reason] = None
            logger.warning("The activation cache is not used, because %s.", reason)

    def _salt(self, kind: Kind) -> str:
        device = next(self.model.parameters()).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        name, asked, changed, modes = kind
        return f"{name}{sorted(map(repr, asked))}{sorted(map(repr, changed))}{modes.hex()}{autocast}"

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
        """Free optimizer states. If such a parameter did train again, its state would start afresh."""
        optimizer = self._optimizer() if self._optimizer is not None else None
        if optimizer is None or type(optimizer).__module__.startswith("deepspeed"):  # states of many parameters in one
            return
        for place in range(border):
            for _, tensor in self.prefix.tensors_at(place):
                if tensor.requires_grad and tensor.grad is None and tensor in optimizer.state:
                    state = optimizer.state.pop(tensor)
                    self.freed_bytes += sum(value.nbytes for value in tensors_in(state))

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
        """Note that every row was seen once more. If no row ever recurs, switch the cache off."""
        known, seen = self.found - self._at_epoch[0], self.looked_up - self._at_epoch[1]
        if self._epochs and seen and not known and not self._objection_to:
            self.refuse(
                "no row of this epoch occurred in the one before: packed rows differ in each epoch. Pack once, before "
                "training, or do not pack"
            )
        self._epochs += 1
        self._at_epoch = self.found, self.looked_up

    def note_whole(self, forward: CachedForward, border: int, stream: torch.Tensor) -> None:
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


def _padded_on_the_left(mask: Any) -> bool:
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())


def _reads_labels(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _length_matters(model: nn.Module) -> bool:
    """Whether rotary positions are scaled by the length of the padded batch."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rotary = str([getattr(text, name, None) for name in ("rope_parameters", "rope_scaling")])
    return any(word in rotary for word in ("dynamic", "longrope"))
