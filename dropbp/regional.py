"""Compiling a model block by block: the recommended way to use `torch.compile` with dropped branches.

The idea: a block of two branches has four masks, so four graphs serve every block of its kind and every step, whatever
the depth. Compiled as a whole the same model has a graph for each mask of all branches that it ever meets. The graphs
of one kind of block are shared by its instances, so the number does not grow with the depth either.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch import nn

from dropbp.errors import ConfigError, StateError
from dropbp.session import Handle, handle_of

logger = logging.getLogger(__name__)

OTHER_GRAPHS = 1  # a block's graph without gradients, for evaluation


def compile_blocks(enabled: Handle | nn.Module, **options: Any) -> tuple[str, ...]:
    """Compile every block of an enabled model in place, `module.compile(**options)`.

    Names, classes and `state_dict` keys stay. Each combination of a block's branches that a step drops makes one graph
    the first time it is met, so all compilation lies in the first steps.

    Args:
        enabled: the handle that `dropbp.enable` returned, or the model it was given.
        **options: of `torch.compile`: backend, mode, fullgraph, dynamic, options.

    Returns:
        Qualified names of the blocks that were compiled.

    Raises:
        StateError: the model is not enabled.
        ConfigError: no block repeats in it; compile the whole model with `masks="nested"` or `masks="pool"` instead.
    """
    handle = enabled if isinstance(enabled, Handle) else handle_of(enabled)
    if handle is None or not handle.enabled:
        raise StateError(
            "compile_blocks needs a model that is enabled: handle = dropbp.enable(model, ...), then "
            "dropbp.compile_blocks(handle)."
        )
    blocks = {branch.block: handle.model.get_submodule(branch.block) for branch in handle.branches if branch.block}
    if not blocks:
        raise ConfigError(
            f"{type(handle.model).__name__} has no repeated blocks to compile one by one. Use torch.compile on all of "
            "it, with masks='nested' or masks='pool', which keep the number of different masks small."
        )
    for module in set(blocks.values()):
        module.compile(**options)
    _warn_of_limit(graphs_needed(handle, blocks))
    return tuple(blocks)


def graphs_needed(handle: Handle, blocks: dict[str, nn.Module]) -> int:
    """An upper bound of the graphs of all blocks, taking blocks of one class to be of one kind."""
    branches = Counter(branch.block for branch in handle.branches)
    of_class = {type(module): 2 ** branches[name] + OTHER_GRAPHS for name, module in blocks.items()}
    return sum(of_class.values())


def _warn_of_limit(needed: int) -> None:
    limit = getattr(torch._dynamo.config, "recompile_limit", None)
    if limit is not None and needed > limit:
        logger.warning(
            "up to %d graphs are needed; torch._dynamo.config.recompile_limit is %d, what is over it runs uncompiled",
            needed,
            limit,
        )
