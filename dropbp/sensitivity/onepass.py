"""Sensitivities of all branches from one backward pass and two forward passes.

Dropping branch l removes the gradients of its own parameters, and the part of the gradients below that came through the
branch. Let `d_l` be the gradient at the branch's inputs, and `T` the map that carries a gradient from there to the
parameters below: their gradients change from `g` to `g - T d_l`. To first order, the norm of all of them together falls
by `<g, T d_l> / |g|`, so

    S_l = sum over own parameters |g|^2 + <g, T d_l>^2 / sum over parameters below |g|^2.

One backward gives every `d_l`, but `T d_l` would take a backward for each branch. Its inner product with `g` does not:
transposed, `<g, T d_l> = <T' g, d_l>`, and `T' g` is how the branch's inputs move when all parameters move along their
gradients. One more forward with slightly moved parameters shows that for every branch at once.

If a branch's inputs cannot be observed, the norms of the stream's gradient give an estimate instead: `sum over
parameters below |g|^2 * (1 - |g_in - d_l| / |g_in|)^2`, which needs no second forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dropbp import branch_sets
from dropbp.discovery.cuts import needs
from dropbp.discovery.graph import Graph
from dropbp.discovery.record import Recorder
from dropbp.discovery.structure import Structure
from dropbp.discovery.walks import reached
from dropbp.sensitivity.edges import edges_of_branches
from dropbp.tensors import tensors_in

Source = tuple[Any, int]  # an output of an autograd node: (node, index of the output)
Place = tuple[str, int, int]  # a tensor passed to a module: (module, index of the call, index of the tensor)

STEP_SHARE = 2e-3  # of a tensor's norm: small, but far above the rounding of bfloat16 summed over all elements
LARGEST_MOVE = 0.2  # of a tensor's norm: beyond it the second forward differed otherwise (dropout not repeated)


@dataclasses.dataclass(frozen=True)
class BranchInput:
    """A point where a node of a branch uses a tensor from outside the branch."""

    branch: int
    consumer: Any
    place: int
    number: int
    source: Source


@dataclasses.dataclass(frozen=True)
class Observation:
    """For every branch: squared norms of its own gradients and of those below, and two measures of the loss below.

    Attributes:
        own: sum of |g|^2 over the branch's own parameters.
        below: sum of |g|^2 over the parameters that the branch's inputs depend on.
        inner_products: <g, T d_l>; NaN if the branch's inputs could not be observed.
        ratios: |g_in - d_l| / |g_in|.
    """

    own: tuple[float, ...]
    below: tuple[float, ...]
    inner_products: tuple[float, ...]
    ratios: tuple[float, ...]

    def sensitivities(self) -> tuple[float, ...]:
        """S_l of every branch."""
        each = zip(self.own, self.below, self.inner_products, self.ratios, strict=True)
        return tuple(own + _part_below(below, inner_product, ratio) for own, below, inner_product, ratio in each)


def _part_below(below: float, inner_product: float, ratio: float) -> float:
    if below == 0:
        return 0.0
    return below * (1 - ratio) ** 2 if math.isnan(inner_product) else inner_product * inner_product / below


class OnePass:
    """Observes one forward and backward, then one forward with moved parameters, and reports the result."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model, self.structure = model, structure
        self.recorder = Recorder(model, count_flops=False, adds_in_place=structure.adds_in_place)
        self.inputs = _Inputs(model, structure)
        self.branch_inputs = _BranchInputs(len(structure.branches))
        self.own: list[dict[str, int]] = []
        self.below: list[set[str]] = []

    @contextlib.contextmanager
    def first_forward(self, forward: Callable[[], Tensor]) -> Iterator[Tensor]:
        """Run the forward; run the backward of its loss inside the `with` block."""
        with self.recorder:  # also during the backward: checkpointing must recompute exactly the first forward
            with self.inputs.remembered():
                loss = forward()
            try:
                self._read_graph(Graph(self.recorder.trace(loss), self.model))
                yield loss
            finally:
                self.branch_inputs.unhook()
                self.recorder.functions = ()

    def _read_graph(self, graph: Graph) -> None:
        need = needs(graph, edges_of_branches(graph, self.structure, self.inputs.calls.keys()))
        edges = input_edges(graph, self.recorder.functions, need, len(self.structure.branches))
        self.own = _owned(graph, need, len(edges))
        self.below = _parameters_below(graph, [[edge.number for edge in entering] for entering in edges])
        kept = self.inputs.keep_only({edge.source for entering in edges for edge in entering})
        self.branch_inputs.watch(edges, kept)

    def step(self, squares: Mapping[str, float]) -> float:
        """The length of the step along the gradients; 0 if it would show nothing.

        A tensor x with gradient g moves by at least `step * below / |g|`, since its movement times g is what the
        parameters below add to the loss.
        """
        reach = [
            self.inputs.norm(source) * self.branch_inputs.norm(source) / below
            for branch, below in enumerate(self._sums(squares))
            for source in self.branch_inputs.sources[branch]
            if below > 0 and self.inputs.watches(source)
        ]
        return STEP_SHARE * min(reach, default=0.0)

    def second_forward(self) -> contextlib.AbstractContextManager[None]:
        """Run the second forward inside this context."""
        return self.inputs.compared(self.branch_inputs.leaving)

    def observation(self, squares: Mapping[str, float], step: float) -> Observation:
        """The observations, given the squared norm of every gradient and the step of the second forward (0: none)."""
        own = tuple(math.fsum(squares.get(name, 0.0) / k**2 for name, k in names.items()) for names in self.own)
        inner_products = tuple(self._inner_product(branch, step) for branch in range(len(own)))
        return Observation(own, self._sums(squares), inner_products, self.branch_inputs.ratios())

    def _sums(self, squares: Mapping[str, float]) -> tuple[float, ...]:
        return tuple(math.fsum(squares.get(name, 0.0) for name in names) for names in self.below)

    def _inner_product(self, branch: int, step: float) -> float:
        """<g, T d_l> from the observed inputs; weights of a mixture, changed in place, may be missing."""
        seen = [source for source in self.branch_inputs.sources[branch] if (branch, source) in self.inputs.products]
        if not step or not seen or not all(self.inputs.moved_little(source) for source in seen):
            return math.nan
        return math.fsum(float(self.inputs.products[branch, source]) for source in seen) / step


class _BranchInputs:
    """The gradients that leave the branches at their inputs, and those that arrive at the sources of these inputs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.sources: list[list[Source]] = [[] for _ in range(count)]
        self.branches: dict[Source, list[int]] = {}
        self.leaving: dict[tuple[int, Source], Tensor] = {}
        self.squares: dict[Source, Tensor] = {}
        self.remaining: dict[tuple[int, Source], Tensor] = {}
        self.kept_sources: set[Source] = set()
        self.handles: list[RemovableHandle] = []

    def watch(self, branch_inputs: Sequence[Sequence[BranchInput]], kept: set[Source]) -> None:
        """Hook the nodes; the gradients leaving to `kept` sources stay in `leaving`, the others only as norms."""
        self.kept_sources = kept
        for branch_input in (e for entering in branch_inputs for e in entering):
            if branch_input.source not in self.sources[branch_input.branch]:
                self.sources[branch_input.branch].append(branch_input.source)
                self.branches.setdefault(branch_input.source, []).append(branch_input.branch)
            self.handles.append(branch_input.consumer.register_hook(functools.partial(self._leave, branch_input)))
        for source in self.branches:
            self.handles.append(source[0].register_prehook(functools.partial(self._arrive, source)))

    def unhook(self) -> None:
        """Remove the hooks: nodes hold their hooks, and these hold the nodes."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _leave(
        self, branch_input: BranchInput, inputs: Sequence[Tensor | None], outputs: Sequence[Tensor | None]
    ) -> None:
        gradient, key = inputs[branch_input.place], (branch_input.branch, branch_input.source)
        if gradient is not None:
            before = self.leaving.get(key)
            self.leaving[key] = gradient if before is None else before + gradient

    def _arrive(self, source: Source, gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[source[1]]
        if gradient is None:
            return
        self.squares[source] = _square(gradient)
        for branch in self.branches[source]:
            leaving = self.leaving.get((branch, source))
            self.remaining[branch, source] = _square(gradient if leaving is None else gradient - leaving)
            if source not in self.kept_sources:
                self.leaving.pop((branch, source), None)

    def norm(self, source: Source) -> float:
        """Norm of the whole gradient that arrives at a source."""
        return math.sqrt(float(self.squares.get(source, 0.0)))

    def ratios(self) -> tuple[float, ...]:
        """Relative norm of the gradient at a branch's sources without the branch's part."""
        return tuple(self._ratio(branch) for branch in range(self.count))

    def _ratio(self, branch: int) -> float:
        arriving = math.fsum(float(self.squares.get(source, 0.0)) for source in self.sources[branch])
        left = math.fsum(float(self.remaining.get((branch, source), 0.0)) for source in self.sources[branch])
        return math.sqrt(left / arriving) if arriving else 1.0


class _Inputs:
    """The inputs that branches' modules take from outside, and how they move."""

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.modules = {module.name: model.get_submodule(module.name) for module in structure.branch_modules}
        self.needs = {module.name: module.needs for module in structure.branch_modules}
        self.calls: dict[str, int] = {}
        self.created_by: dict[Source, int] = {}
        self.seen: dict[Source, tuple[Place, Tensor, int]] = {}
        self.source_at: dict[Place, Source] = {}
        self.products: dict[tuple[int, Source], Tensor] = {}
        self.relative_moves: dict[Source, float] = {}

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """In the forward inside the context, keep the inputs of the modules (without copies)."""
        with self._hooks(self._remember, self._note_creator):
            yield
        self.created_by = {}

    @contextlib.contextmanager
    def compared(self, leaving: Mapping[tuple[int, Source], Tensor]) -> Iterator[None]:
        """In the forward inside the context, multiply movements by gradients."""
        by_source: dict[Source, list[tuple[int, Tensor]]] = {}
        for (branch, source), gradient in leaving.items():
            by_source.setdefault(source, []).append((branch, gradient))
        with self._hooks(functools.partial(self._compare, by_source), None):
            yield

    @contextlib.contextmanager
    def _hooks(self, before: Callable[..., None], after: Callable[..., None] | None) -> Iterator[None]:
        self.calls = {}
        handles: list[RemovableHandle] = []
        for name, module in self.modules.items():
            enter = functools.partial(self._enter, name, before)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(functools.partial(after, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, then: Callable[..., None], module: nn.Module, args: Any, kwargs: Any) -> None:
        call = self.calls.get(name, 0)
        self.calls[name] = call + 1
        for number, tensor in enumerate(tensors_in((args, kwargs))):
            then((name, call, number), tensor)

    def _need(self, name: str, call: int) -> int:
        needs = self.needs[name]
        return needs[call % len(needs)]

    def _remember(self, place: Place, tensor: Tensor) -> None:
        """Keep a module's input unless another module of the same branch created it."""
        source = (tensor.grad_fn, tensor.output_nr)
        if tensor.grad_fn is not None and self.created_by.get(source) != self._need(place[0], place[1]):
            self.seen.setdefault(source, (place, tensor.detach(), tensor._version))

    def _note_creator(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        need = self._need(name, self.calls[name] - 1)
        self.created_by.update({(t.grad_fn, t.output_nr): need for t in tensors_in(output) if t.grad_fn is not None})

    def _compare(self, by_source: Mapping[Source, Sequence[tuple[int, Tensor]]], place: Place, tensor: Tensor) -> None:
        source = self.source_at.get(place)
        if source is None or self.seen[source][1].shape != tensor.shape:
            return
        before = self.seen[source][1].float()
        movement = tensor.detach().float() - before
        self.relative_moves[source] = math.sqrt(float(_square(movement)) / max(float(_square(before)), 1e-300))
        for branch, gradient in by_source.get(source, ()):
            self.products[branch, source] = (movement * gradient.float()).sum()

    def keep_only(self, sources: set[Source]) -> set[Source]:
        """Release all other tensors, and those changed in place since; return the sources that are left."""
        self.seen = {s: seen for s, seen in self.seen.items() if s in sources and seen[1]._version == seen[2]}
        self.source_at = {place: source for source, (place, _, _) in self.seen.items()}
        return set(self.seen)

    def watches(self, source: Source) -> bool:
        """Whether the source's tensor is known."""
        return source in self.seen

    def norm(self, source: Source) -> float:
        """Norm of the source's tensor."""
        return math.sqrt(float(_square(self.seen[source][1])))

    def moved_little(self, source: Source) -> bool:
        """Whether the second forward equals the first one up to a small movement."""
        return self.relative_moves.get(source, math.inf) <= LARGEST_MOVE


def _square(tensor: Tensor) -> Tensor:
    return tensor.detach().float().square().sum()


def input_edges(graph: Graph, functions: Sequence[Any], need: Sequence[int], count: int) -> list[list[BranchInput]]:
    """For every branch, the points where its nodes use tensors of other parts of the model, parameters excluded."""
    number = {function: i for i, function in enumerate(functions)}
    found: list[list[BranchInput]] = [[] for _ in range(count)]
    for node in graph.nodes:
        branch = _only_branch(need[node.index])
        if node.is_leaf or branch is None:
            continue
        for place, (function, output) in enumerate(functions[node.index].next_functions):
            source = number.get(function, -1)
            if source >= 0 and need[source] != need[node.index] and not graph.nodes[source].is_leaf:
                branch_input = BranchInput(branch, functions[node.index], place, source, (function, output))
                found[branch].append(branch_input)
    return found


def _only_branch(need: int) -> int | None:
    return branch_sets.sole(need).bit_length() - 1 if branch_sets.sole(need) else None


def _owned(graph: Graph, need: Sequence[int], count: int) -> list[dict[str, int]]:
    """For every branch, the parameters it uses directly, each with the number of parts of the model that use it."""
    owned: list[dict[str, int]] = [{} for _ in range(count)]
    for node in graph.nodes:
        name = graph.parameter_names.get(id(node.leaf)) if node.is_leaf else None
        users = {need[user] for user in graph.consumers[node.index]}
        for branch in {_only_branch(user) for user in users} - {None}:
            if name is not None and branch is not None:
                owned[branch][name] = len(users)
    return owned


def _parameters_below(graph: Graph, starts: Sequence[Sequence[int]]) -> list[set[str]]:
    """For every branch, the parameters that its inputs depend on; nodes are numbered in the order of creation."""
    known: dict[int, set[str]] = {}
    for start in sorted({start for each in starts for start in each}):
        numbers = reached([start], lambda n: () if n in known else graph.nodes[n].inputs)
        leaves = (graph.nodes[n].leaf for n in numbers if graph.nodes[n].is_leaf)
        names = {graph.parameter_names.get(id(leaf), "") for leaf in leaves}
        known[start] = names.union(*(known.get(n, ()) for n in numbers)) - {""}
    return [set().union(*(known[start] for start in each)) for each in starts]
