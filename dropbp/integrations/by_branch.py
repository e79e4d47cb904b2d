"""Splits a trainer's optimizer step and gradient clipping by branch, for lazy devices, on the trainer's own instances.

The optimizer keeps its own groups, so its saved state fits a run with or without DropBP. The groups are split only
during a step, into parts in which either all parameters are skipped or none is. Values that an optimizer writes into a
part (Gaudi's `FusedAdamW` counts steps there) are kept in the group under `PARTS` and saved with it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dropbp.lazy.grouping import ParameterGroup, clip_grad_norm_grouped, marked_groups

if TYPE_CHECKING:
    from dropbp.handle import Handle

logger = logging.getLogger(__name__)

PARTS = "dropbp_parts"
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class ByBranch:
    """Splits the work of a trainer with an optimizer between backward and the next forward, until `remove`."""

    def __init__(self, handle: Handle, trainer: Any) -> None:
        self.handle = handle
        self.boundary = handle.device.step_boundary
        self._undo: list[tuple[Any, str, Any, Any]] = []
        optimizer = unwrapped(trainer.optimizer)
        self.optimizer, self._step = optimizer, optimizer.step
        self._put(optimizer, "step", self.step)
        self._put(trainer.accelerator, "clip_grad_norm_", self.clip)
        if getattr(trainer, "FusedNorm", None) is not None:
            self._put(trainer, "FusedNorm", FusedNormByBranch(self, trainer.args.max_grad_norm))

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer step, part by part."""
        self.boundary()
        with self._parts() as parts, marked_groups(self.optimizer, self.boundary, parts):
            return self._step(*args, **kwargs)

    def clip(self, parameters: Any, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """Clip by the norm of all gradients, part by part; return the norm before clipping."""
        self.boundary()
        given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        parts = self.handle.group_parameters([{"params": given}])
        groups = [part["params"] for part in parts]
        return clip_grad_norm_grouped(groups, max_norm, norm_type, step_boundary=self.boundary)

    def remove(self) -> None:
        """Restore the instances. If another wrapper was put around ours since, it stays and ours forwards calls."""
        for owner, name, ours, before in reversed(self._undo):
            if vars(owner).get(name) is not ours:
                continue
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._undo.clear()

    def _put(self, owner: Any, name: str, ours: Any) -> None:
        self._undo.append((owner, name, ours, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, ours)

    @contextmanager
    def _parts(self) -> Iterator[Sequence[ParameterGroup]]:
        groups = self.optimizer.param_groups
        plain = [{key: value for key, value in group.items() if key != PARTS} for group in groups]
        cut = [(group, self.handle.group_parameters([own])) for group, own in zip(groups, plain, strict=True)]
        for group, parts in cut:
            for part, own in zip(parts, _saved_parts(group, len(parts)), strict=True):
                part.update(own)
        yield [part for _, parts in cut for part in parts]
        for group, parts in cut:
            _save_parts(group, parts)


class FusedNormByBranch:
    """Replaces Gaudi's `FusedClipNorm`."""

    def __init__(self, by_branch: ByBranch, max_norm: float) -> None:
        self.by_branch, self.max_norm = by_branch, max_norm

    def clip_norm(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """Clip as `FusedClipNorm.clip_norm` does."""
        return self.by_branch.clip(parameters, self.max_norm)


_ABSENT = object()


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def is_sharded(trainer: Any) -> bool:
    """Whether gradients are sharded over ranks, so that only the sharding engine knows their norms."""
    return str(trainer.accelerator.distributed_type).rpartition(".")[2] in SHARDED


def _saved_parts(group: ParameterGroup, count: int) -> Sequence[Mapping[str, Any]]:
    saved = group.get(PARTS)
    if saved is None:
        return [{}] * count
    if len(saved) != count:
        logger.warning("The saved optimizer has %d parts, this one %d: its parts are not loaded.", len(saved), count)
        return [{}] * count
    return list(saved)


def _save_parts(group: ParameterGroup, parts: Sequence[ParameterGroup]) -> None:
    """Keep the values that the optimizer wrote into the parts; the group itself gets the highest step count."""
    known = group.keys() - {"step"}
    own = [{key: value for key, value in part.items() if key != "params" and key not in known} for part in parts]
    if not any(own):
        return
    group[PARTS] = own
    steps = [part["step"] for part in parts if "step" in part]
    if steps:
        group["step"] = max(steps)
