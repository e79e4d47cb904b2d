"""Finds what a forward uses and no module of its model holds: a parameter of a hook, the output of another model.

`enable` does not know that it trains. If a branch is dropped after its use, its gradient is that of the residual stream
alone.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn

from dropbp.discovery.trace import sequence_of
from dropbp.discovery.walks import nodes_below

logger = logging.getLogger(__name__)

_WARNING = (
    "%s: its forward uses %s, as a forward hook may. In steps that drop a branch after its use, it gets no gradient. "
    "Let the model hold all that trains, as a parameter or a submodule, before dropbp.enable: then the drop rates "
    "allow for it. Or pass it to the forward as an input."
)


class ForeignSources:
    """Tells whether autograd nodes use something foreign, and warns of it once.

    A tensor that is not an `nn.Parameter` may be made in the forward itself: hooks for gradient checkpointing make the
    embeddings such leaves. So it counts from the second inspected forward on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._warned = model, False
        self._seen: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def known(self) -> set[int]:
        """Ids of the model's parameters, and of the nodes that made them if they are no leaves."""
        parameters = list(self._model.parameters())
        return set(map(id, parameters)) | {id(p.grad_fn) for p in parameters if p.grad_fn is not None}

    def is_sharded(self) -> bool:
        """Whether modules use gathered tensors instead of their parameters, so that none is known (FSDP2)."""
        return any(hasattr(module, "set_unshard_in_backward") for module in self._model.modules())

    def counts(self, leaf: torch.Tensor, start: int) -> bool:
        """Whether several forwards use a foreign leaf; `start` is the first node of this one. If so, warn of it."""
        is_parameter = isinstance(leaf, nn.Parameter)
        if not is_parameter and self._is_new(leaf, start):
            return False
        kind = "parameter" if is_parameter else "tensor"
        self.warn(f"a {kind} of shape {tuple(leaf.shape)} that no module of it holds")
        return True

    def _is_new(self, leaf: torch.Tensor, start: int) -> bool:
        self._seen = {key: entry for key, entry in self._seen.items() if entry[0]() is not None}
        return self._seen.setdefault(id(leaf), (weakref.ref(leaf), start))[1] == start

    def warn(self, what: str) -> None:
        """Warn of something foreign, the first time."""
        if not self._warned:
            self._warned = True
            logger.warning(_WARNING, type(self._model).__name__, what)


def is_computed_before(source: Any, start: int) -> bool:
    """Whether a node lies in a graph from before node `start`, other than one that only makes views of parameters."""
    if hasattr(source, "variable") or sequence_of(source) >= start:
        return False
    return not any(is_flat(getattr(node, "variable", None)) for node in nodes_below([source]))


def is_flat(leaf: Any) -> bool:
    """Whether a leaf holds the parameters of many modules, of which these use views (FSDP1)."""
    return type(leaf).__name__ == "FlatParameter"
