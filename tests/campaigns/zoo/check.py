"""Is a branch dropped exactly? The reference is a plain backward whose gradient into the branch is set to zero.

The plain model runs with autograd on; a hook on the output node of the branch zeroes the gradient that enters it.
Dropping that branch must give a bit-identical loss, no gradients for the branch's own parameters, and the same
gradients everywhere else.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch
from torch import nn

import dropbp
from dropbp import inputs as example
from dropbp.discovery.branches import branch_cuts
from dropbp.discovery.graph import Graph
from dropbp.discovery.record import Recorder, differentiable
from dropbp.tensors import tensors_in

TOLERANCE = 1e-4


@dataclasses.dataclass
class Verdict:
    """The outcome of one architecture.

    `verdict` is `right`, `refused` (`detail` is the error), `wrong` (`detail` is the difference), `crashed` or
    `unbuilt`. Shares are of the weights (two or more dimensions) that got a gradient in a plain backward, and of the
    FLOPs. `given` names the arguments of the call. `warned` means that the library warned of missing its budget.
    """

    name: str
    family: str
    verdict: str
    detail: str = ""
    branches: int = 0
    weights_in_branches: float = 0.0
    flops_in_branches: float = 0.0
    least_covered: dict[str, Any] | None = None
    seconds: float = 0.0
    given: str = ""
    warned: bool = False


def check_model(name: str, family: str, model: nn.Module, inputs: example.Inputs | None = None) -> Verdict:
    """Drop every branch alone, then two in three, and compare."""
    given = None if inputs is None else (dict(inputs.kwargs) or inputs.args)
    try:
        handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=given)
    except dropbp.DiscoveryError as error:
        return Verdict(name, family, "refused", str(error))
    inputs = inputs or example.build(model, 2, 16)
    with handle:
        problem = _first_problem(handle, model, inputs)
        weights = _used_weights(handle, model, inputs)
        return Verdict(
            name,
            family,
            "wrong" if problem else "right",
            problem,
            len(handle.branches),
            _share(handle, weights),
            handle.report()["branch_flops_share"],
            _least_covered(handle, weights),
            given=", ".join(inputs.kwargs),
        )


def _used_weights(handle: Any, model: nn.Module, inputs: example.Inputs) -> dict[str, int]:
    """Number of elements per weight that get a gradient in a plain backward; of stacked experts, only those used."""
    model.zero_grad()
    with handle.fixed([False] * len(handle.branches)):
        _loss(model(*inputs.args, **inputs.kwargs)).backward()
    return {name: _hit(p.grad) for name, p in model.named_parameters() if p.dim() >= 2 and p.grad is not None}


def _hit(gradient: torch.Tensor) -> int:
    if gradient.dim() == 2:
        return gradient.numel() if gradient.any() else 0
    slices = gradient.flatten(1).any(dim=1)
    return int(slices.sum()) * gradient[0].numel()


def _share(handle: Any, weights: Mapping[str, int]) -> float:
    needs = handle.engine.structure.parameters
    return sum(n for name, n in weights.items() if name in needs) / max(1, sum(weights.values()))


def _least_covered(handle: Any, weights: Mapping[str, int]) -> dict[str, Any] | None:
    """The numbered block with the smallest share of its weights in branches, and the weights outside."""
    shares = []
    lists = {block.rpartition(".")[0] for block in handle.engine.structure.blocks}
    blocks = {n for n, _ in handle.model.named_modules() if n.rpartition(".")[0] in lists and n[-1:].isdigit()}
    for block in sorted(blocks):
        own = {name: n for name, n in weights.items() if name.startswith(f"{block}.") and n}
        if own:
            outside = [name for name in own if name not in handle.engine.structure.parameters]
            shares.append({"block": block, "share": _share(handle, own), "outside": outside})
    return min(shares, key=lambda entry: float(entry["share"]), default=None)


def _first_problem(handle: Any, model: nn.Module, inputs: example.Inputs) -> str:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    leave_inputs_alone(model)
    plain = _Plain(handle, model, inputs)
    count = len(handle.branches)
    for i in range(count):
        mask = [i == j for j in range(count)]
        problem = _compare(handle, model, inputs, mask, plain)
        if problem:
            return f"branch {handle.branches[i].name}: {problem}"
    several = [i % 3 != 1 for i in range(count)]
    problem = _compare(handle, model, inputs, several, plain)
    return f"mask {several}: {problem}" if problem else ""


def _compare(handle: Any, model: nn.Module, inputs: example.Inputs, mask: list[bool], plain: _Plain) -> str:
    seed()
    model.zero_grad()
    with handle.fixed(mask):
        loss = _loss(model(*inputs.args, **inputs.kwargs))
    loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    return _difference(handle, mask, loss.detach(), plain.loss.detach(), got, plain.gradients(mask))


class _Plain:
    """A forward that drops nothing; its graph is run backward once per mask."""

    def __init__(self, handle: Any, model: nn.Module, inputs: example.Inputs) -> None:
        self.model, self.recorder = model, Recorder(model, count_flops=False)
        count = len(handle.branches)
        seed()
        with handle.fixed([False] * count), self.recorder:
            args, kwargs = differentiable(inputs.args, inputs.kwargs)
            outputs = model(*args, **kwargs)
        self.loss = _loss(outputs)
        self.groups = branch_cuts(Graph(self.recorder.trace(outputs), model))
        assert len(self.groups) == count, f"{len(self.groups)} branches in the training forward, {count} when enabled"

    def gradients(self, mask: list[bool]) -> dict[str, torch.Tensor | None]:
        """The gradients with zero in place of the gradient that enters each dropped branch."""
        heads = [head for group, drop in zip(self.groups, mask, strict=True) if drop for _, head in group]
        hooks = [self.recorder.functions[head].register_prehook(zeros) for head in dict.fromkeys(heads)]
        self.model.zero_grad()
        self.loss.backward(retain_graph=True)
        for hook in hooks:
            hook.remove()
        return {name: p.grad for name, p in self.model.named_parameters()}


def leave_inputs_alone(model: nn.Module) -> None:
    """Do not ask inputs for gradients: convolutions of speech models do, which is an error if the input has one
    already.
    """
    for module in model.modules():
        if hasattr(module, "_requires_grad"):
            module._requires_grad = False


def seed() -> None:
    """Seed NumPy too, whose random numbers speech models use to mask frames."""
    torch.manual_seed(1)
    numpy.random.seed(1)  # noqa: NPY002
    random.seed(1)


def zeros(gradients: Any) -> Any:
    return tuple(g if g is None else torch.zeros_like(g) for g in gradients)


def _loss(outputs: Any) -> torch.Tensor:
    """A reproducible loss that depends on every element of every output."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensors_in(outputs):
        if tensor.requires_grad:
            weights = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64)).reshape(tensor.shape)
            total = total + (tensor.double() * weights).sum()
    return total


def _difference(
    handle: Any,
    mask: Iterable[bool],
    loss: torch.Tensor,
    expected_loss: torch.Tensor,
    got: Mapping[str, torch.Tensor | None],
    expected: Mapping[str, torch.Tensor | None],
) -> str:
    if not torch.equal(loss, expected_loss):
        return f"the loss is {loss.item()!r}, expected {expected_loss.item()!r}"
    dropped = sum(1 << i for i, d in enumerate(mask) if d)
    for name, need in handle.engine.structure.parameters.items():
        if need & dropped == need and got[name] is not None:
            return f"parameter {name} got a gradient though its branch was dropped"
    for name, gradient in expected.items():
        problem = _gradient_differs(got[name], gradient)
        if problem:
            return f"parameter {name}: {problem}"
    return ""


def _gradient_differs(got: torch.Tensor | None, expected: torch.Tensor | None) -> str:
    if expected is None or not expected.any():
        return "" if got is None or not got.any() else "a gradient where none was expected"
    if got is None:
        return "no gradient where one was expected"
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return "" if error <= TOLERANCE else f"gradients differ by {error:.1e}"
