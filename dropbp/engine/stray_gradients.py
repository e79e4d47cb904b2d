"""Cuts gradients of skipped parameters that the model uses in a way that discovery did not see.

A dropped or frozen module runs without recording. But a model may use its weight without calling the module: only in
training, only for some inputs, or after clamping it. Such a use is in the autograd graph of the step, and its gradient
is cut there. Uses after the blocks stay, for example AdaLoRA's loss on the weights of a dropped branch. The graph is
searched in every step that drops a branch for the first time and, once a stray use was found, in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dropbp._torch import transforming
from dropbp.discovery.trace import sequence_of
from dropbp.discovery.walks import nodes_below
from dropbp.engine.parameters import Parameters
from dropbp.tensors import tensors_in

if TYPE_CHECKING:
    from dropbp.engine.runtime import ForwardRecord


class StrayGradients:
    """Cuts the gradients of parameters that a step skips, in the graph of its forward."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._inspected, self._found = 0, False  # branches, as bits, that an inspected forward has dropped

    def cut(self, outputs: Any, record: ForwardRecord) -> None:
        """Inspect a recorded forward and cut the gradients of skipped parameters."""
        plan = record.plan
        untrained = ~plan.trained
        if not untrained or not (self._found or untrained & ~self._inspected) or transforming():
            return
        self._inspected |= untrained
        skipped, frozen_stem = self._parameters.skipped(plan)
        for node in nodes_below(tensor.grad_fn for tensor in tensors_in(outputs)):
            among = skipped if sequence_of(node) < record.blocks_end else frozen_stem
            sources = enumerate(node.next_functions)
            places = [place for place, (leaf, _) in sources if id(getattr(leaf, "variable", None)) in among]
            if places:
                self._found = True
                node.register_hook(functools.partial(_without, places))


def _without(places: Iterable[int], gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
    return tuple(None if place in places else gradient for place, gradient in enumerate(gradients))
