"""Cuts gradients of skipped parameters that the model uses in a way that discovery did not see.

A dropped or frozen module runs without recording. But a model may use its weight without calling the module: only in
training, only for some inputs, or after clamping it. Such a use is in the autograd graph of the step, and its gradient
is cut there. Uses after the blocks stay, for example AdaLoRA's loss on the weights of a dropped branch. What `enable`
could not know, because it came later or no module holds it, gets no gradient if a branch is dropped after its use.

The graph is searched in every step that drops a branch for the first time, again after the model has changed and, once
a stray use was found, in every step. Changes that do not show, such as that of a flag, are looked for in ever longer
intervals. A reentrant checkpoint hides a part of the graph until it recomputes that part, which is searched then.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, Any

from dropbp._torch import transforming
from dropbp.discovery.trace import sequence_of
from dropbp.discovery.walks import nodes_below
from dropbp.engine.foreign import ForeignSources, is_computed_before, is_flat
from dropbp.engine.parameters import Parameters
from dropbp.engine.trained import abbreviated
from dropbp.tensors import tensors_in

if TYPE_CHECKING:
    from dropbp.engine.runtime import ForwardRecord

logger = logging.getLogger(__name__)

_ADDED = (
    "came into the model after dropbp.enable, so it is unknown which branches lie above. Such parameters train only in "
    "steps that drop no branch after their use."
)
_TIED = "share a parameter since dropbp.enable, which trains only in steps that keep all branches above each of them."
_REMEDY = "Add all parameters first and enable last: handle.remove(), then dropbp.enable(model, ...)."


class StrayGradients:
    """Cuts the gradients of parameters that a step skips, in the graph of its forward."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters, self._foreign = parameters, ForeignSources(parameters.model)
        self._warned, self._forwards = set[str](), 0
        self.found = False  # whether a stray use was found
        self.note_changed_model()

    def note_changed_model(self) -> None:
        """Search the graph of the next step that drops a branch, because the model has changed."""
        self._inspected = 0  # branches, as bits, that an inspected forward has dropped

    def cut(self, outputs: Any, record: ForwardRecord) -> None:
        """Inspect a recorded forward and cut the gradients of skipped parameters."""
        untrained = ~record.plan.trained
        if not untrained or transforming():
            return
        self._forwards += 1
        seldom = not self._forwards & (self._forwards - 1)  # forwards 1, 2, 4, 8, ...
        if seldom or self.found or self._parameters.tied or untrained & ~self._inspected:
            self._inspected |= untrained
            self._search(_Uses(self._parameters, self._foreign, record), None, outputs)

    def _search(self, uses: _Uses, inside: int | None, outputs: Any, inputs: Container[int] = ()) -> None:
        """Cut gradients in a graph: of the forward, or of what a checkpoint recomputes, which is `inside` a node."""
        for node in nodes_below(tensor.grad_fn for tensor in tensors_in(outputs)):
            if node.name() == "ConnectToAnchorBackward":
                continue
            sequence = sequence_of(node) if inside is None else inside
            places = [i for i, (source, _) in enumerate(node.next_functions) if uses.is_cut(source, sequence, inputs)]
            if places:
                node.register_hook(functools.partial(_without, places))
            if hasattr(node, "run_function"):
                node.run_function = _Recomputing(node.run_function, functools.partial(self._search, uses, sequence))
        self.found |= uses.found
        self._warn(uses.reportable)

    def _warn(self, found: set[int]) -> None:
        """Warn once of parameters that train in fewer steps, because they were added or tied after `enable`."""
        parameters = self._parameters
        for names, what in ((parameters.unplaced, _ADDED), (parameters.tied, _TIED)):
            model = parameters.model
            new = {n for n in names if n not in self._warned and id(model.get_parameter(n)) in found}
            if new:
                self._warned |= new
                each = [name for name, _ in model.named_parameters(remove_duplicate=False)]
                named = abbreviated((name for name in each if name in new), each)
                logger.warning("%s: %s %s %s", type(model).__name__, named, what, _REMEDY)


class _Uses:
    """Tells which uses of tensors in one forward get no gradient.

    `found`: some that later forwards may have, too. `reportable`: ids of parameters that a warning may name.
    """

    def __init__(self, parameters: Parameters, foreign: ForeignSources, record: ForwardRecord) -> None:
        self._skipped, self._frozen_stem, self._unplaced = parameters.skipped(record.plan)
        self._known, self._foreign = foreign.known(), foreign
        self._start, self._blocks_end = record.start, record.blocks_end
        self._dropped_end = record.dropped_end if record.plan.stem_frozen else 0
        self._seeks_foreign = not foreign.is_sharded()
        self.found, self.reportable = False, set[int]()

    def is_cut(self, source: Any, sequence: int, inputs: Container[int]) -> bool:
        """Whether a node with this number gives no gradient to a source; `inputs` are those of a checkpoint."""
        if source is None:
            return False
        leaf = getattr(source, "variable", None)
        among = self._skipped if sequence < self._blocks_end else self._frozen_stem
        is_cut, is_unplaced = id(leaf) in among, id(leaf) in self._unplaced and sequence < self._blocks_end
        self.reportable |= {id(leaf)} if is_cut or is_unplaced else set()
        if not is_cut and self._start <= sequence < self._dropped_end:
            if not is_unplaced and self._seeks_foreign and id(leaf) not in inputs:
                return self._is_foreign(source, leaf)
            is_cut = is_unplaced
        self.found |= is_cut
        return is_cut

    def _is_foreign(self, source: Any, leaf: Any) -> bool:
        if id(source) in self._known or id(leaf) in self._known or is_flat(leaf):
            return False
        if leaf is not None:
            self.found |= self._foreign.counts(leaf, self._start)
            return True
        if not is_computed_before(source, self._start):
            return False
        self.found = True
        self._foreign.warn("a tensor that was computed before it and is none of its inputs")
        return True


class _Recomputing(functools.partial[Any]):
    """Searches the graph of what a reentrant checkpoint recomputes. It shows what it calls, as a partial does."""

    search: Callable[..., None]

    def __new__(cls, function: Callable[..., Any], search: Callable[..., None]) -> _Recomputing:
        self = super().__new__(cls, function)
        self.search = search
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().__call__(*args, **kwargs)
        self.search(outputs, set(map(id, tensors_in((args, kwargs)))))
        return outputs


def _without(places: Iterable[int], gradients: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
    return tuple(None if place in places else gradient for place, gradient in enumerate(gradients))
