"""Which interceptions a handle puts on its model, and which graphs a lazy device will make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dropbp.discovery.structure import Structure
from dropbp.engine.checkpointing import install_blocks
from dropbp.engine.patch import Interception
from dropbp.engine.recompute import Recomputation
from dropbp.engine.runtime import RootState, Runtime
from dropbp.engine.wrappers import install, install_boundaries, install_exits, install_stems
from dropbp.lazy.warmup import Layer, Rehearsal


def put_in_place(
    model: nn.Module,
    structure: Structure,
    runtime: Runtime,
    root: RootState,
    recomputation: Recomputation,
    *,
    scales: bool,
    stem_rests: bool,
    boundary: str,
    step_boundary: Callable[[], None],
) -> list[Interception]:
    """Put all functions in place; the innermost first, so that removal in reverse order is exact.

    Args:
        model: the root.
        structure: what to intercept in it.
        runtime: the state that all interceptions share.
        root: what runs the root's forward.
        recomputation: of the blocks, in the backward.
        scales: whether gradients of kept branches are scaled.
        stem_rests: whether what feeds the stream rests in steps that drop its first branch.
        boundary: `none`, `layer` or `sublayer`: where a lazy device is told that a step ends.
        step_boundary: tells it.
    """
    made = install(model, structure, runtime, root)
    if stem_rests:
        made += install_stems(model, structure.stems, runtime)
    made += install_blocks(model, structure.blocks, runtime, recomputation)
    if scales:
        made += install_exits(model, structure, runtime)
    if boundary != "none":
        made += install_boundaries(model, _starts(structure, boundary), step_boundary)
        made += install_boundaries(model, _last_blocks(structure), step_boundary, after=True)
    recomputation.look()
    return made


def _starts(structure: Structure, boundary: str) -> list[str]:
    names = list(structure.blocks)
    if boundary == "sublayer":
        names += [branch.modules[0] for branch in structure.branches if branch.modules]
    return list(dict.fromkeys(names))


def _last_blocks(structure: Structure) -> list[str]:
    """The last block of each list: what comes after, the head and the loss, gets a graph of its own."""
    return list({name.rpartition(".")[0]: name for name in structure.blocks}.values())


def rehearsal(model: nn.Module, structure: Structure, stem_rests: bool, recomputed: Callable[[int], int]) -> Rehearsal:
    """The rehearsal of a model's blocks, and of what feeds them if that rests at times."""
    parts = [*(structure.stems.items() if stem_rests else ()), *structure.blocks.items()]
    layers = [Layer(_kind(model.get_submodule(name)), need) for name, need in parts]
    return Rehearsal(layers, (1 << len(structure.branches)) - 1, recomputed)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of one kind record the same graphs."""
    return type(block), tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters())
