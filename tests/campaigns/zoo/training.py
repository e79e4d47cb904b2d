"""Does training under the default of `dropbp.enable` keep its promises? Compared with a plain copy, step by step.

The copy is made before `enable` and runs the same batches from the same random state. By default each step trains the
top of the model down to some depth with exact gradients, so a parameter has either the gradient of the plain backward
or none. Parameters in no single branch (a tied embedding, a position bias, the norms of post-norm blocks) are frozen in
some steps; the report must name them. PyTorch's own counter counts the FLOPs of a step's backward.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dropbp
from dropbp import inputs as example
from dropbp._torch import next_sequence
from dropbp.discovery.branches import branch_cuts
from dropbp.discovery.build import restricted_to_main_output
from dropbp.discovery.cuts import needs
from dropbp.discovery.graph import Graph
from dropbp.discovery.record import Recorder, differentiable
from dropbp.discovery.trace import sequence_of
from dropbp.discovery.walks import nodes_below
from dropbp.tensors import tensors_in
from tests.campaigns.zoo.check import leave_inputs_alone, seed, zeros
from tests.campaigns.zoo.tiny import Unbuildable, batches_to_train_on

TOLERANCE = 1e-4
BUDGET_TOLERANCE = 0.02
BUDGET_STEPS = 64
EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")
DROP_RATE = 0.5
REFUSED, REMEDY = "refused in the call:", "Do not ask for this output"


@dataclasses.dataclass
class Step:
    """The results of one forward and backward."""

    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def problems(model: nn.Module, inputs: example.Inputs | None) -> tuple[list[str], bool]:
    """The first difference from plain training per way to call and to enable, empty if there is none; and whether the
    library warned of missing its budget.
    """
    model.train()
    given = None if inputs is None else (dict(inputs.kwargs) or inputs.args)
    batches = _batches(model, inputs)
    found = []
    masks, fresh = 0, copy.deepcopy(model)  # some models hold state that cannot be copied after a run
    for title, batch in batches.items():
        for steps in (False, True):
            with _enabled(copy.deepcopy(fresh), given, masks if steps else None) as (handle, plain):
                masks = len(handle.branches) + 1
                problem = _trained(handle, plain, batch)
            if problem:
                found.append(f"{title}, {'with' if steps else 'without'} steps: {problem}")
    budget, warned = _budget_problem(fresh, given, next(iter(batches.values())))
    return [*found, budget] if budget else found, warned


def _batches(model: nn.Module, inputs: example.Inputs | None) -> dict[str, dict[str, Any]]:
    """Batches as in a training loop: labels if the model takes them, the model's default for the cache; then
    variations.
    """
    found = inputs or example.build(model, 2, 16)
    batch = {name: value for name, value in found.kwargs.items() if name != "use_cache"}
    taken = inspect.signature(model.forward).parameters
    extras = {name: True for name in EXTRA_OUTPUTS if name in taken or hasattr(model.config, name)}
    plain = next((each for each in batches_to_train_on(model, batch) if _runs(model, each)), None)
    if plain is None:
        raise Unbuildable("the tiny model cannot take a plain training step")
    batches = {"plain call": plain}
    for names in (tuple(extras), ("output_hidden_states",)):
        asked = {**plain, **{name: True for name in names if name in extras}}
        if asked.keys() != plain.keys() and _runs(model, asked):
            return {**batches, f"with {', '.join(names)}": asked}
    return batches


def _asks_for_more(batch: Mapping[str, Any]) -> bool:
    return any(name in batch for name in EXTRA_OUTPUTS)


def _runs(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    try:
        step = _step(copy.deepcopy(model), batch)
    except Exception:
        return False
    return any(gradient is not None and gradient.any() for gradient in step.gradients.values())


@contextmanager
def _enabled(model: nn.Module, given: Any, steps: int | None) -> Iterator[tuple[Any, nn.Module]]:
    plain = copy.deepcopy(model)
    options = {} if steps is None else {"steps": steps}
    with dropbp.enable(model, DROP_RATE, example_inputs=given, **options) as handle:
        yield handle, plain


def _step(model: nn.Module, batch: Mapping[str, Any]) -> Step:
    seed()
    model.zero_grad(set_to_none=True)
    outputs = model(**copy.copy(dict(batch)))
    _loss(outputs, "labels" in batch and not _asks_for_more(batch)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return Step([t.detach() for t in tensors_in(outputs)], gradients, buffers)


def _loss(outputs: Any, labelled: bool) -> torch.Tensor:
    """The model's own loss. If it has none, or more outputs were requested, a loss that depends on every output
    element.
    """
    own = getattr(outputs, "loss", None)
    if labelled and isinstance(own, torch.Tensor):
        return own
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_in(outputs):
        if tensor.requires_grad:
            weights = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape)
            total = total + (tensor.double() * weights).sum()
    return total


class _Plain:
    """The steps of the plain copy. If they leave buffers unchanged, all are equal and one is enough."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.model, self.batch = model, batch
        before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.last = _step(model, batch)
        self.repeats = all(torch.equal(before[name], b) for name, b in self.last.buffers.items() if name in before)
        self.taken = 1

    def step(self, number: int) -> Step:
        if not self.repeats and number >= self.taken:
            self.last = _step(self.model, self.batch)
            self.taken += 1
        return self.last


def _trained(handle: Any, plain_model: nn.Module, batch: Mapping[str, Any]) -> str:
    plain = _Plain(plain_model, batch)
    ever: set[str] = set()
    for number in range(len(handle.branches) + 1):
        try:
            got = _step(handle.model, batch)
        except Exception as error:  # TooSlow passes, as it is not an Exception
            message = " ".join(str(error).split())
            refused = isinstance(error, dropbp.StateError) and _asks_for_more(batch) and REMEDY in message
            return f"{REFUSED} {message}" if refused else f"step {number + 1}: {type(error).__name__}: {message[:300]}"
        problem = _difference(handle, got, plain.step(number), batch)
        if problem:
            return f"step {number + 1}, mask {''.join('x' if drop else '-' for drop in handle.mask)}: {problem}"
        ever |= {name for name, gradient in got.gradients.items() if gradient is not None}
    return _unnamed(handle, ever, plain.last)


def _difference(handle: Any, got: Step, expected: Step, batch: Mapping[str, Any]) -> str:
    if len(got.outputs) != len(expected.outputs):
        return f"{len(got.outputs)} output tensors, expected {len(expected.outputs)}"
    for place, (one, other) in enumerate(zip(got.outputs, expected.outputs, strict=True)):
        if not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)):
            return f"output {place} differs by {(one.double() - other.double()).abs().max():.1e}"
    for name, buffer in got.buffers.items():
        if not torch.equal(torch.nan_to_num(buffer), torch.nan_to_num(expected.buffers[name])):
            return f"buffer {name} is not as after a plain step"
    dropped = sum(1 << i for i, drop in enumerate(handle.mask) if drop)
    wanted = {**expected.gradients, **_besides_the_stream(handle, got, dropped, batch)}
    each = {
        name: _gradient_problem(handle, name, dropped, gradient, wanted[name])
        for name, gradient in got.gradients.items()
    }
    wrong = [f"{name} ({problem})" for name, problem in each.items() if problem]
    return f"{len(wrong)} parameters: {', '.join(wrong[:4])}" if wrong else ""


def _gradient_problem(
    handle: Any, name: str, dropped: int, got: torch.Tensor | None, expected: torch.Tensor | None
) -> str:
    need = handle.engine.structure.parameters.get(name)
    if got is None:
        kept = need is not None and not need & dropped
        lost = kept and expected is not None and bool(expected.any())
        return "no gradient though its branch was kept" if lost else ""
    if expected is None:
        dead = need is not None and need & ~dropped == 0
        return "a gradient though its branch was dropped" if dead else "a gradient where plain has none" * got.any()
    if not expected.any():
        return f"a gradient of norm {got.norm():.1e} where plain's is zero" * bool(got.any())
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return "" if error <= TOLERANCE else f"gradients differ by {error:.1e}"


def _besides_the_stream(
    handle: Any, got: Step, dropped: int, batch: Mapping[str, Any]
) -> dict[str, torch.Tensor | None]:
    """Gradients of dropped branches' parameters from requested outputs that come out of these branches.

    Such a branch is `x + f(x).detach()`. The gradients come from a backward of the whole model, cut where branches are
    added.
    """
    needs = handle.engine.structure.parameters
    names = {name for name, need in needs.items() if need & ~dropped == 0}
    if all(got.gradients[name] is None for name in names) or not _asks_for_more(batch):
        return dict.fromkeys(names)
    model, before = handle.model, {name: buffer.detach().clone() for name, buffer in handle.model.named_buffers()}
    recorder = Recorder(model, count_flops=False)
    seed()
    model.zero_grad(set_to_none=True)
    with handle.engine.measuring((False,) * len(handle.branches)), recorder:
        outputs = model(**copy.copy(dict(batch)))
    loss = _loss(outputs, labelled=False)
    for end in _ends(handle, recorder, outputs, dropped):
        end.register_prehook(zeros)
    loss.backward()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return {name: model.get_parameter(name).grad for name in names}


def _ends(handle: Any, recorder: Recorder, outputs: Any, dropped: int) -> set[Any]:
    """The autograd nodes whose outputs the dropped branches add to the stream.

    If the call exposes more than `enable` saw, branch numbers do not match (PegasusX adds unused values to its global
    tokens in the last layer). Then the outputs of the branches' last modules are used.
    """
    whole = recorder.trace(outputs)
    trace, _ = restricted_to_main_output(whole, handle.model)
    graph = Graph(trace, handle.model)
    groups = branch_cuts(graph)
    if len(groups) == len(handle.branches):
        heads = (head for place, group in enumerate(groups) if dropped >> place & 1 for _, head in group)
        return {recorder.functions[head] for head in heads}
    calls: dict[str, list[Any]] = {}
    for call in graph.calls:
        calls.setdefault(call.name, []).append(call)
    last = [each for each in handle.engine.structure.branch_outputs if dropped >> each.branch & 1]
    made = {calls[e.module][number].outputs[place] for e in last for number in e.calls for place in e.places}
    return {recorder.functions[node.index] for node in whole.nodes if not node.is_leaf and node.sequence in made}


def _unnamed(handle: Any, ever: set[str], plain: Step) -> str:
    """Parameters that plain training moves but no step will must be named in the report; a rate below 1 promises a
    step.
    """
    if all(branch.rate < 1 for branch in handle.branches):
        return ""
    moved = {name for name, gradient in plain.gradients.items() if gradient is not None and gradient.any()}
    named = _named_as_frozen_at_times(handle)
    silent = sorted(name for name in moved - ever if name not in named)
    return f"never trained and not named in report(): {len(silent)} parameters, first {silent[0]}" if silent else ""


def _named_as_frozen_at_times(handle: Any) -> set[str]:
    """Parameters that the report names, and those of branches that it counts as dropped in every step."""
    report = handle.report()
    named = {name for key in ("never_trained", "seldom_trained", "at_rest") for name in report.get(key, ())}
    never = sum(1 << i for i, branch in enumerate(report["branches"]) if branch["dropped"] == report["forwards"])
    return named | {name for name, need in handle.engine.structure.parameters.items() if need & ~never == 0}


# -- the budget


def _budget_problem(model: nn.Module, given: Any, batch: Mapping[str, Any]) -> tuple[str, bool]:
    """The share of the branches' backward that a run skipped, by counted FLOPs, compared with drop rate and report; and
    whether the library warned of missing its budget.
    """
    owners, inside = _Owners(model), _products_of_branches(copy.deepcopy(model), batch)
    masks: list[tuple[bool, ...]] = []
    spent: dict[tuple[bool, ...], int] = {}
    warned = _Warnings()
    with (
        warned,
        dropbp.enable(model, DROP_RATE, example_inputs=given, steps=BUDGET_STEPS, max_activations=None) as handle,
    ):
        for step in range(BUDGET_STEPS):
            loss = _forward(model, batch)
            masks.append(handle.mask)
            if step and handle.mask not in spent:  # the first forward shows the library the kind of graph
                spent[handle.mask] = _spent(loss, owners, inside)
        reported = handle.report()["realised_drop_rate"]
        with handle.fixed([False] * len(handle.branches)):
            whole = _spent(_forward(model, batch), owners, inside)
    if any("its budget" in message or "Nothing is dropped" in message for message in warned.seen):
        return "", True
    known = [spent[mask] for mask in masks if mask in spent]
    share = 1 - sum(known) / len(known) / max(1, whole)
    if max(abs(share - DROP_RATE), abs(reported - DROP_RATE)) > BUDGET_TOLERANCE:
        return f"budget: {share:.3f} of the branches' FLOPs skipped, {reported:.3f} reported", False
    return "", False


class _Owners(dict[int, str]):
    """Maps the number of an autograd node to the innermost module that created it.

    Args:
        model: its modules record it from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._starts: list[int] = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                module.register_forward_pre_hook(self._enter, prepend=True)
                module.register_forward_hook(functools.partial(self._leave, name))

    def _enter(self, *_: Any) -> None:
        self._starts.append(next_sequence())

    def _leave(self, name: str, *_: Any) -> None:
        for number in range(self._starts.pop(), next_sequence()):
            self.setdefault(number, name)


Product = tuple[str, str]  # a module, and the kind of an autograd node that it creates


def _products_of_branches(model: nn.Module, batch: Mapping[str, Any]) -> set[Product]:
    """Nodes that get no gradient if every branch is cut where it is added to the stream."""
    leave_inputs_alone(model)
    recorder = Recorder(model, count_flops=False)
    seed()
    with recorder:
        args, kwargs = differentiable((), batch)
        outputs = model(*args, **kwargs)
    graph = Graph(restricted_to_main_output(recorder.trace(outputs), model)[0], model)
    need = needs(graph, branch_cuts(graph))
    inside = (node for node in graph.nodes if need[node.index] > 0 and graph.trace.call_of[node.index] >= 0)
    return {(graph.calls[graph.trace.call_of[node.index]].name, node.name) for node in inside}


def _spent(loss: torch.Tensor, owners: Mapping[int, str], inside: set[Product]) -> int:
    """FLOPs of a backward within branches. Savings outside them are extra and not part of the promise."""
    spent, starts = 0, []

    def before(_: Any) -> None:
        starts.append(counter.get_total_flops())

    def after(*_: Any) -> None:
        nonlocal spent
        spent += counter.get_total_flops() - starts.pop()

    for node in nodes_below([loss.grad_fn]):
        if (owners.get(sequence_of(node)), node.name()) in inside:
            node.register_prehook(before)
            node.register_hook(after)
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        loss.backward()
    return spent


def untie(model: Any) -> None:
    """Give the head its own weight: savings of a frozen tied embedding are outside the branches."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return
    others = (p for module in model.modules() if module is not head for p in module.parameters(recurse=False))
    if any(parameter is head.weight for parameter in others):
        head.weight = nn.Parameter(head.weight.detach().clone())


def flops_of_backward(loss: torch.Tensor) -> int:
    """FLOPs by PyTorch's counter, with formulas for the operations it lacks."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        loss.backward()
    return int(counter.get_total_flops())


def backward_flops(handle: Any, batch: Mapping[str, Any], dropped: Sequence[bool]) -> tuple[int, list[int]]:
    """FLOPs of the backward that remain with all these branches dropped, and the reduction by each further one.

    Branches are dropped from the lowest up, as the masks do.
    """
    count = len(handle.branches)
    masks = [[i < border and dropped[i] for i in range(count)] for border in range(count + 1)]
    counts = [counted_backward(handle, batch, mask) for mask in masks]
    return counts[-1], [more - less for more, less in itertools.pairwise(counts)]


def counted_backward(handle: Any, batch: Mapping[str, Any], mask: list[bool]) -> int:
    """FLOPs of a step's backward under a mask, by PyTorch's counter."""
    with handle.fixed(mask):
        return flops_of_backward(_forward(handle.model, batch))


def _forward(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    seed()
    model.zero_grad(set_to_none=True)
    return _loss(model(**copy.copy(dict(batch))), "labels" in batch)


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """PyTorch's formula, which in torch 2.10 refuses keys with fewer heads than the query."""
    rows, heads, length, width = query
    return int(2 * rows * heads * length * key[-2] * (width + value[-1]))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _attention(query, key, value)


def _grouped(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """Each row of `a` is multiplied by one matrix of `b`; if both are two-dimensional, the rows are summed over."""
    batch = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * batch * a[-2] * a[-1] * b[-1])


def _convolution_backward(grad: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """PyTorch's formula treats the weight of a grouped convolution as that of a full one."""
    transposed, asked = args[4], args[7]
    places = x if transposed else grad
    return int(2 * x[0] * math.prod(weight) * math.prod(places[2:]) * sum(asked[:2]))


UNCOUNTED = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten._grouped_mm: _grouped,
}


class _Warnings(logging.Handler):
    """Records whether the library warned in the meantime."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[str] = []
        self.logger = logging.getLogger("dropbp")

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())

    def __enter__(self) -> _Warnings:
        self.disabled, self.root = self.logger.manager.disable, logging.root
        logging.disable(logging.NOTSET)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        self.logger.removeHandler(self)
        logging.disable(self.disabled)
