"""Cuts gradients of skipped parameters that the model uses in a way that discovery did not see.

A dropped or frozen module runs without recording. But a model may use its weight without calling the module: only in
training, only for some inputs, or after clamping it. Such a use is in the autograd graph of the step, and its gradient
is cut there. Uses after the blocks stay, for example AdaLoRA's loss on the weights of a dropped branch. The graph is
searched in every step that drops a branch for the first time, again after the model has changed and, once a stray use
was found, in every step.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dropbp._torch import transforming
from dropbp.discovery.trace import sequence_of
from dropbp.discovery.walks import nodes_below
from dropbp.engine.parameters import Parameters
from dropbp.engine.trained import abbreviated
from dropbp.tensors import tensors_in

if TYPE_CHECKING:
    from dropbp.engine.runtime import ForwardRecord

logger = logging.getLogger(__name__)

_ADDED = (
    "came into the model after dropbp.enable, so it is unknown which branches lie above. Such parameters train only in "
    "steps that drop nothing."
)
_TIED = "share a parameter since dropbp.enable, which trains only in steps that keep all branches above each of them."
_REMEDY = "Add all parameters first and enable last: handle.remove(), then dropbp.enable(model, ...)."


class StrayGradients:
    """Cuts the gradients of parameters that a step skips, in the graph of its forward."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._inspected, self._found = 0, False  # branches, as bits, that an inspected forward has dropped
        self._told: set[str] = set()

    def inspect_anew(self) -> None:
        """Search the graph of the next step that drops a branch, because the model has changed."""
        self._inspected = 0

    def cut(self, outputs: Any, record: ForwardRecord) -> None:
        """Inspect a recorded forward and cut the gradients of skipped parameters."""
        plan = record.plan
        untrained = ~plan.trained
        search = self._found or self._parameters.tied or untrained & ~self._inspected
        if not untrained or not search or transforming():
            return
        self._inspected |= untrained
        skipped, frozen_stem = self._parameters.skipped(plan)
        cut: set[int] = set()
        for node in nodes_below(tensor.grad_fn for tensor in tensors_in(outputs)):
            among = skipped if sequence_of(node) < record.blocks_end else frozen_stem
            sources = enumerate(node.next_functions)
            places = [place for place, (leaf, _) in sources if id(getattr(leaf, "variable", None)) in among]
            if places:
                self._found = True
                cut |= {id(node.next_functions[place][0].variable) for place in places}
                node.register_hook(functools.partial(_without, places))
        self._tell(cut)

    def _tell(self, found: set[int]) -> None:
        """Warn once of parameters that train in fewer steps, because they were added or tied after `enable`."""
        parameters = self._parameters
        for names, what in ((parameters.unplaced, _ADDED), (parameters.tied, _TIED)):
            model = parameters.model
            new = {n for n in names if n not in self._told and id(model.get_parameter(n)) in found}
            if new:
                self._told |= new
                each = [name for name, _ in model.named_parameters(remove_duplicate=False)]
                named = abbreviated((name for name in each if name in new), each)
                logger.warning("%s: %s %s %s", type(model).__name__, named, what, _REMEDY)


def _without(places: Iterable[int], gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
    return tuple(None if place in places else gradient for place, gradient in enumerate(gradients))
