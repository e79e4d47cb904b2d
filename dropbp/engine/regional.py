"""Compiles a model block by block: the recommended way to use `torch.compile` with dropped branches.

A block of two branches has four masks, so four graphs serve all blocks of a kind in every step, whatever the depth of
the model. The instances of a block share their graphs. Compiled as a whole, the same model needs one graph for each
mask that occurs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dropbp.discovery.structure import Branch
from dropbp.errors import ConfigError

logger = logging.getLogger(__name__)

OTHER_GRAPHS = 1  # the graph of a block without gradients, for evaluation


def compile_each(model: nn.Module, branches: Sequence[Branch], options: Mapping[str, Any]) -> tuple[str, ...]:
    """Compile in place every block that contains one of these branches; return their names. See `compile_blocks`."""
    blocks = {branch.block: model.get_submodule(branch.block) for branch in branches if branch.block}
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} has no repeated blocks to compile one by one. Use torch.compile on all of it with "
            "masks='nested' or masks='pool', which keep the number of different masks small."
        )
    for module in set(blocks.values()):
        module.compile(**options)
    _warn_of_limit(graphs_needed(branches, blocks))
    return tuple(blocks)


def graphs_needed(branches: Sequence[Branch], blocks: Mapping[str, nn.Module]) -> int:
    """An upper bound of the number of graphs, if all blocks of a class are of one kind."""
    count = Counter(branch.block for branch in branches)
    of_class = {type(module): 2 ** count[name] + OTHER_GRAPHS for name, module in blocks.items()}
    return sum(of_class.values())


def _warn_of_limit(needed: int) -> None:
    limit = getattr(torch._dynamo.config, "recompile_limit", None)
    if limit is not None and needed > limit:
        logger.warning(
            "Up to %d graphs are needed, but torch._dynamo.config.recompile_limit is %d. PyTorch runs further graphs "
            "uncompiled: raise the limit.",
            needed,
            limit,
        )
