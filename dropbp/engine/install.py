"""Which interceptions a handle puts on its model, and which graphs a lazy device will make of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dropbp.discovery.stem import Rests
from dropbp.discovery.structure import Structure
from dropbp.engine.checkpointing import install_blocks
from dropbp.engine.patch import Interception
from dropbp.engine.recompute import Recomputation
from dropbp.engine.runtime import RootState, Runtime, root_forward
from dropbp.engine.wrappers import install, install_boundaries, install_exits
from dropbp.lazy.warmup import Layer, Rehearsal


def put_in_place(
    model: nn.Module,
    structure: Structure,
    runtime: Runtime,
    root: Callable[[], RootState],
    recomputation: Recomputation,
    *,
    scales: bool,
    rests: Rests,
    boundary: str,
    step_boundary: Callable[[], None],
) -> list[Interception]:
    """Put all functions in place; the innermost first, so that removal in reverse order is exact.

    Args:
        model: the root.
        structure: what to intercept in it.
        runtime: the state that all interceptions share.
        root: makes what runs the root's forward, or a backbone's.
        recomputation: of the blocks, in the backward.
        scales: whether gradients of kept branches are scaled.
        rests: what rests beside the branches.
        boundary: `none`, `layer` or `sublayer`: where a lazy device is told that a step ends.
        step_boundary: tells it.
    """
    made = install(model, structure, runtime, rests)
    made += [Interception(module, "_dropbp_root", root(), root_forward) for module in _backbones(model, structure)]
    made += install_blocks(model, structure.blocks, runtime, recomputation)
    if scales:
        made += install_exits(model, structure, runtime)
    if boundary != "none":
        made += install_boundaries(model, _starts(structure, boundary), step_boundary)
        made += install_boundaries(model, _last_blocks(structure), step_boundary, after=True)
    recomputation.look()
    return made


def _backbones(model: nn.Module, structure: Structure) -> Iterator[nn.Module]:
    """The modules that hold all branches, the root last: those above the first numbered element."""
    ways = (name.split(".")[:-1] for branch in structure.branches for name in branch.modules)
    shared = itertools.takewhile(
        lambda parts: len(set(parts)) == 1 and not parts[0].isdigit(), zip(*ways, strict=False)
    )
    path = [parts[0] for parts in shared]
    for count in range(len(path), -1, -1):
        module = model.get_submodule(".".join(path[:count]))
        if type(module).forward is not nn.Module.forward:  # a list of blocks is never called
            yield module


def _starts(structure: Structure, boundary: str) -> list[str]:
    names = list(structure.blocks)
    if boundary == "sublayer":
        names += [branch.modules[0] for branch in structure.branches if branch.modules]
    return list(dict.fromkeys(names))


def _last_blocks(structure: Structure) -> list[str]:
    """The last block of each list: what comes after, the head and the loss, gets a graph of its own."""
    return list({name.rpartition(".")[0]: name for name in structure.blocks}.values())


def rehearsal(model: nn.Module, structure: Structure, rests: Rests, recomputed: Callable[[int], int]) -> Rehearsal:
    """The rehearsal of a model's blocks, and of what rests at times beside their branches."""
    parts = [*rests.modules.items(), *structure.blocks.items()]
    layers = [Layer(_kind(model.get_submodule(name)), need) for name, need in parts]
    return Rehearsal(layers, (1 << len(structure.branches)) - 1, recomputed)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Blocks of one kind record the same graphs."""
    return type(block), tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in block.parameters())
