"""Outputs that a call asks for but discovery did not see: router scores, attention maps, auxiliary losses.

A dropped branch can run without recording because its inside leads to the residual stream only. If a call asks for more
(a flag, a changed setting, another argument, an unseen output), this is not known. So in the first forwards of each
kind of call, dropped branches are recorded and detached where they are added to the stream. The gradient is then that
of `x + f(x).detach()`, whatever other outputs there are. Afterwards the autograd graph is inspected: a branch whose
nodes no output reaches runs without recording from then on; a branch that an output reaches stays recorded.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dropbp.branch_sets import EVERY
from dropbp.discovery.walks import nodes_below, reached, sources
from dropbp.errors import StateError
from dropbp.inputs import CallSignature, argument_names, call_signature
from dropbp.masks.plan import ForwardPlan
from dropbp.tensors import held_by_modules, outputs_by_key

if TYPE_CHECKING:
    from dropbp.discovery.structure import BranchOutput, Structure

# Arguments of transformers that change no output, except that `labels` adds the loss of the logits.
_WITHOUT_SIDE_OUTPUTS = frozenset({
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "cache_position", "labels",
    "shift_labels", "num_items_in_batch", "logits_to_keep", "use_cache", "past_key_values", "decoder_input_ids",
    "decoder_attention_mask",
})  # fmt: skip
_KEPT_STATES = frozenset({"past_key_values", "cache_params", "mems", "past_buckets_states", "rnn_state", "state"})
_MAX_PLANS = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallPlan(ForwardPlan):
    """The plan of a forward of one kind of call; `observation` collects what it shows of its detached branches."""

    kind: CallKind
    observation: Observation | None = None


class CallKind:
    """Calls that ask for the same outputs.

    Attributes:
        undetachable: branches, as bits, that can only be dropped by not recording them.
        isolated: branches whose inside reaches an output only through the residual stream.
        leaking: branches whose inside reaches an output in another way.
        outputs: keys of the outputs seen, each with whether it requires a gradient.
        held: names of the tensors that modules hold as attributes.
        untried: no forward of this kind has run an unrecorded branch yet.
    """

    def __init__(self, undetachable: int, outputs: Mapping[str, bool] | None = None, held: Iterable[str] = ()) -> None:
        self.undetachable, self.isolated, self.leaking = undetachable, undetachable, 0
        self.outputs, self.held = dict(outputs or {}), frozenset(held)
        self.untried = True
        self._plans: dict[int, tuple[ForwardPlan, CallPlan]] = {}

    def plan(self, plan: ForwardPlan) -> CallPlan:
        """Adapt a plan to this kind of call."""
        detached = plan.dropped & ~self.isolated
        if detached & ~self.leaking:
            return self._observing(plan, detached)
        known = self._plans.get(id(plan))
        if known is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            known = self._plans[id(plan)] = plan, self._of(plan, detached, plan.truncated, None)
        return known[1]

    def _observing(self, plan: ForwardPlan, detached: int) -> CallPlan:
        """Keep the full backward: below a truncation, outputs would look as if they never required a gradient."""
        return self._of(plan, detached, False, Observation())

    def _of(self, plan: ForwardPlan, detached: int, truncated: bool, observation: Observation | None) -> CallPlan:
        return CallPlan(
            dropped=plan.dropped & ~detached, factors=plan.factors, checkpointed=plan.checkpointed,
            stem_frozen=plan.stem_frozen, truncated=truncated, detached=detached, kind=self, observation=observation,
        )  # fmt: skip

    def observed_again(self, plan: ForwardPlan) -> CallPlan:
        """The same plan without relying on earlier observations."""
        self.isolated, self.leaking = self.undetachable, 0
        self._plans.clear()
        return self._observing(plan, (plan.dropped | plan.detached) & ~self.undetachable)

    def has_new(self, outputs: Any, model: nn.Module | None) -> bool:
        """Whether there is an output, or a tensor held by a module of `model`, that was not there before."""
        if any(key not in self.outputs for key, _ in outputs_by_key(outputs)):
            return True
        return model is not None and not self.held.issuperset(name for name, _ in held_by_modules(model))

    def update(self, plan: ForwardPlan, observation: Observation, outputs: Any, model: nn.Module) -> None:
        """Learn from an observed forward.

        Raises StateError if what a dropped branch adds to the stream is an output itself, or reaches one in another
        way.
        """
        leaking = observation.leaking(outputs, model)
        self.leaking |= leaking & plan.detached
        self.isolated = (self.isolated | observation.observed & plan.detached) & ~self.leaking
        self._plans.clear()
        for key, tensor in outputs_by_key(outputs):
            self.outputs[key] = self.outputs.get(key, False) or tensor.requires_grad


class CallKinds:
    """The kinds of calls of one model; `recorded` is what the call recorded for discovery asked for."""

    def __init__(self, model: nn.Module, structure: Structure, recorded: CallSignature) -> None:
        self._names = argument_names(model)
        self._without_side_outputs = _WITHOUT_SIDE_OUTPUTS if _is_transformers_model(model) else frozenset[str]()
        self._settings = _Settings(model)
        self._undetachable = ~_detachable(structure.branch_outputs)
        outputs = {**structure.outputs, **({"loss": True} if self._without_side_outputs else {})}
        base = CallKind(self._undetachable, outputs, [name for name, _ in held_by_modules(model)])
        base.isolated = self._undetachable if structure.side_outputs else EVERY
        self._kinds = {(self._key(recorded), self._settings.changed()): base}

    def plan(self, plan: ForwardPlan, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CallPlan:
        """Adapt a plan to this call."""
        key = self.key(args, kwargs)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = CallKind(self._undetachable)
        return kind.plan(plan)

    def key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[CallSignature, CallSignature]:
        """The key of a call's kind: what it asks for, and the settings that were changed."""
        return self._key(call_signature(self._names, args, kwargs)), self._settings.changed()

    def _key(self, signature: CallSignature) -> CallSignature:
        return frozenset(
            entry for entry in signature if entry[0] not in self._without_side_outputs and not self._is_default(*entry)
        )

    def _is_default(self, name: str, value: Any) -> bool:
        """Whether the argument has the value that the model uses by default."""
        return (name == "return_dict" and value is True) or (value is False and not self._settings.has_on(name))


class _Settings:
    """Flags in the configurations of a transformers-style model, which are the defaults of its calls."""

    def __init__(self, model: nn.Module) -> None:
        found = {id(c): vars(c) for c in _configurations(model)}
        self._now = list(found.values())
        self._before = [dict(_flags(values)) for values in self._now]

    def changed(self) -> CallSignature:
        """The flags that were changed since `enable`, with their values."""
        pairs = zip(self._before, self._now, strict=True)
        if all(before.items() <= now.items() for before, now in pairs):
            return frozenset()
        return frozenset(
            (f"{place}.{name}", now.get(name))
            for place, (before, now) in enumerate(zip(self._before, self._now, strict=True))
            for name, value in before.items()
            if isinstance(now.get(name), bool) and now[name] != value
        )

    def has_on(self, name: str) -> bool:
        return any(values.get(name) is True for values in self._now)


def _configurations(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "to_dict") and hasattr(config, "__dict__"):
            yield config


def _flags(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The flags of a configuration. None may stand for a flag that is not set."""
    return ((n, v) for n, v in values.items() if n != "use_cache" and (v is None or isinstance(v, bool)))


def _is_transformers_model(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__module__.startswith("transformers.")


def _detachable(outputs: Sequence[BranchOutput]) -> int:
    """The branches, as bits, whose last outputs are all known."""
    every, missing = 0, 0
    for entry in outputs:
        every |= 1 << entry.branch
        missing |= 0 if entry.places else 1 << entry.branch
    return every & ~missing


class Observation:
    """What a forward with recorded dropped branches shows: the nodes and the outputs of each branch."""

    def __init__(self) -> None:
        self.observed = 0
        self._intervals: list[tuple[int, int, int]] = []
        self._branch_outputs: dict[Any, tuple[str, int]] = {}

    def note(self, need: int, start: int, end: int) -> None:
        """Note that a module of these branches created the nodes from number `start` to before `end`."""
        self.observed |= need
        self._intervals.append((need, start, end))

    def note_output(self, tensor: torch.Tensor, module: str, users: int) -> None:
        """Note a tensor that a branch adds to the stream, and how many operations use it."""
        self._branch_outputs[tensor.grad_fn] = module, users

    def leaking(self, outputs: Any, model: nn.Module) -> int:
        """The branches, as bits, whose inside reaches an output or a tensor that a module holds.

        Raises StateError if the output of a branch reaches an output of the model in another way than through the
        stream.
        """
        requested = ((key, tensor) for key, tensor in outputs_by_key(outputs) if key not in _KEPT_STATES)
        named = (*held_by_modules(model), *requested)
        roots = {tensor.grad_fn: name for name, tensor in named if tensor.grad_fn is not None}
        users = _users(roots)
        for node, (module, expected) in self._branch_outputs.items():
            self._check_output(node, module, expected, users, roots)
        numbers = sorted(node._sequence_nr() for node in users)
        found = 0
        for need, start, end in self._intervals:
            place = bisect.bisect_left(numbers, start)
            if place < len(numbers) and numbers[place] < end:
                found |= need
        return found

    def forget(self) -> None:
        """Release the graph. The plan that holds this observation stays remembered until its backward."""
        self._intervals, self._branch_outputs = [], {}

    def _check_output(
        self, node: Any, module: str, expected: int, users: Mapping[Any, list[Any]], roots: Mapping[Any, str]
    ) -> None:
        """Follow the output of a branch up to its addition to the stream."""
        while node in users:
            if node in roots or len(users[node]) > expected:
                names = {roots[node]} if node in roots else _outputs_reached_by(users[node], users, roots)
                raise StateError(
                    f"The output {' or '.join(sorted(names))} depends on the output of {module} outside the residual "
                    "stream, so dropping its branch would lose that gradient. Do not ask for this output, or name the "
                    "branches to drop, without this one: dropbp.enable(model, branches=[...])."
                )
            if len(users[node]) != 1 or "Add" in users[node][0].name() or len(sources(users[node][0])) != 1:
                return
            node, expected = users[node][0], 1


def _outputs_reached_by(nodes: Iterable[Any], users: Mapping[Any, list[Any]], roots: Mapping[Any, str]) -> set[str]:
    """Names of the outputs that nodes reach. If some of the nodes are no additions to the stream, only these count."""
    starts = [node for node in nodes if "Add" not in node.name()] or list(nodes)
    return {roots[node] for node in reached(starts, users.__getitem__) if node in roots}


def _users(roots: Mapping[Any, str]) -> dict[Any, list[Any]]:
    """Every node that the roots reach, with the nodes that use its outputs."""
    users: dict[Any, list[Any]] = {node: [] for node in nodes_below(roots)}
    for node in users:
        for source in sources(node):
            users[source].append(node)
    return users
