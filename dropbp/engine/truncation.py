"""Truncated backward: decides whether the residual stream's gradient ends at the lowest kept branch.

If the parameters that feed the stream are frozen in a step, nothing below the lowest kept branch needs a gradient. If
the stream then requires none, that branch need not compute the gradient of its input. But a reentrant checkpoint treats
a block as frozen if its input requires no gradient, and compiled code and lazy devices would need twice as many graphs.
So the first training forward keeps the stream's gradient and is observed; later forwards follow what it showed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from dropbp.device import dynamo_graph_count
from dropbp.discovery.walks import nodes_below
from dropbp.engine.runtime import Runtime
from dropbp.tensors import tensors_in

if TYPE_CHECKING:
    from dropbp.engine.checkpointing import CheckpointBypass


class Truncation:
    """Decides for each training forward whether to truncate its backward.

    `possible` says whether the parameters that feed the stream are frozen and nothing known in advance forbids
    truncation.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, bypass: CheckpointBypass, possible: bool) -> None:
        self._model, self._runtime, self._bypass = model, runtime, bypass
        self._possible, self._inspected = possible, False
        self._graphs = dynamo_graph_count()
        if possible:
            runtime.after_forward.append(self._inspect)

    def is_allowed(self) -> bool:
        """Whether to truncate the backward of the next training forward at its lowest kept branch.

        Not if anything was compiled since `enable`, since that may be a part of the model.
        """
        if not (self._possible and self._inspected) or self._runtime.unrecorded_block:
            return False
        return dynamo_graph_count() == self._graphs and not self._bypass.may_be_reentrant()

    def _inspect(self, outputs: Any, dropped: int) -> None:
        """Inspect the first recorded training forward."""
        if self._inspected or not self._model.training:
            return
        self._inspected = True
        roots = [tensor.grad_fn for tensor in tensors_in(outputs) if tensor.grad_fn is not None]
        partitioned = any(hasattr(parameter, "ds_id") for parameter in self._model.parameters())  # DeepSpeed ZeRO-3
        # a node that recomputes part of the forward is a reentrant checkpoint, or similar
        recomputes = any(hasattr(n, "run_function") or "checkpoint" in n.name().lower() for n in nodes_below(roots))
        self._possible = bool(roots) and not partitioned and not recomputes
