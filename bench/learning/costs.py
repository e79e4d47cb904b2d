"""FLOPs of a method on a model, so that methods can be compared at equal FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dropbp

from . import rivals


@dataclass(frozen=True)
class Costs:
    """FLOPs of one micro-batch: the part that always runs, and the full cost of each pass over the blocks."""

    rest: float
    forward: float
    activations: float
    weights: float

    def of(self, work: rivals.Work) -> float:
        """FLOPs of a micro-batch that did this share of the blocks' work."""
        passes = self.forward * work.forward + self.activations * work.activations + self.weights * work.weights
        return self.rest + passes

    @classmethod
    def counted(cls, model: nn.Module, batch: dict[str, Tensor]) -> Costs:
        """Counted from one forward and backward of the model as it is; no gradient stays on it.

        What the blocks' backward costs beyond the gradients of activations is that of weights; activations' gradients
        cost as much as the forward does.
        """
        given: dict[str, Any] = {**batch, "use_cache": False}
        blocks = float(sum(branch.flops for branch in dropbp.discover(model, given)))
        head_trains = any(p.requires_grad for p in cast(Any, model).get_output_embeddings().parameters())
        # The fused attention of CPUs is not known to the counter.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            loss = model(**given).loss
            forward = float(counter.get_total_flops())
            loss.backward()
            total = float(counter.get_total_flops())
        model.zero_grad()
        rest = (forward - blocks) * (3 if head_trains else 2)
        return cls(rest, blocks, blocks, total - rest - 2 * blocks)
