"""Records one small forward: its autograd graph, the module calls that created it, and the FLOPs of each node.

Autograd numbers its nodes in the order of their creation (`Node._sequence_nr`). Reading that counter before and after a
module runs gives the interval of nodes that the call created. Reading it inside a dispatch mode gives the node that an
operator belongs to. So module structure, data flow and FLOPs share one axis, without a table of architectures and
without symbolic tracing. The graph is never run backward, so saved tensors are discarded while recording: it takes the
memory of a forward without gradients, and none on meta tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from dropbp._torch import attention_mask, kernel_depends_on_weight, next_sequence
from dropbp.discovery.restore import (
    all_parameters_require_grad,
    is_unsharded,
    module_attributes_restored,
    recording_mode,
    resharded,
    zero3_state_released,
)
from dropbp.discovery.trace import Call, Trace, collect, innermost_call, sequence_of
from dropbp.errors import DiscoveryError
from dropbp.tensors import held_by_modules, is_differentiable, outputs_by_key, own_output, tensors_in


def record(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, *, identities: bool = False
) -> Trace:
    """Run `model(*args, **kwargs)` once and return the trace; the model is unchanged afterwards.

    With `identities`, modules that return their input, such as dropout in evaluation mode, get a graph node, too.
    Raises DiscoveryError if the forward failed, or no output depends on anything differentiable.
    """
    recorder = Recorder(model, identities=identities)
    with module_attributes_restored(model), contextlib.ExitStack() as stack:
        for guard in (
            resharded(model),
            zero3_state_released(model),
            recording_mode(model),
            all_parameters_require_grad(model),
            recorder,
        ):
            stack.enter_context(guard)
        outputs = _run(model, *differentiable(args, kwargs or {}))
        stack.close()
        trace = recorder.trace(outputs)
        recorder.functions = ()  # the recorder refers to itself, and would keep the graph until garbage is collected
        return trace


def differentiable(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with floating-point tensors given a graph node, so that the first residual addition is recorded."""
    return [_depending(value) for value in args], {name: _depending(value) for name, value in kwargs.items()}


def _depending(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_(True).view_as(value)


def _run(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except Exception as error:
        raise DiscoveryError(
            f"The small forward that finds the residual branches of {type(model).__name__} failed with "
            f"{type(error).__name__}: {error}. Pass example_inputs=... (a dict of keyword arguments, a tuple of "
            "positional ones, or one tensor) that the model accepts, or name the branches with branches=[...]."
        ) from error


class _FlopMode(TorchDispatchMode):
    """Counts each operator's FLOPs with PyTorch's formulas, stored under the autograd node that is being created."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return _likely(args[0])
        formula = _formula(func)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if formula is not None:
            self.records.append((next_sequence() - 1, int(formula(*args, **kwargs, out_val=out))))
        return out


def _likely(value: torch.Tensor) -> bool | int | float:
    """A likely value for a scalar without data: True (a full mask, a single sequence), or one."""
    return True if value.dtype == torch.bool else 1.0 if value.is_floating_point() else 1


def _formula(func: Any) -> Callable[..., int] | None:
    counted = flop_registry.get(func._overloadpacket)
    return _grouped_mm_flops if counted is None and "grouped_mm" in func.__name__ else counted


def _grouped_mm_flops(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """FLOPs of a product of each row of `a` with one of the matrices in `b` (stacked experts)."""
    batch = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return int(2 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1])


class _KernelMode(TorchFunctionMode):
    """Notes calls whose kernel depends on what requires a gradient: an attention mask, or a weight."""

    def __init__(self, note_mask: Callable[[torch.Tensor], None], note_product: Callable[[], None]) -> None:
        super().__init__()
        self.note_mask, self.note_product = note_mask, note_product

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = attention_mask(func, args, kwargs)
        if mask is not None and mask.requires_grad:
            self.note_mask(mask)
        if kernel_depends_on_weight(func, args, kwargs):
            self.note_product()
        return func(*args, **kwargs)


class _AdditionMode(TorchFunctionMode):
    """Notes the sequence numbers of nodes created by in-place additions."""

    OPERATORS = frozenset({"add_", "__iadd__", "sub_", "__isub__", "addcmul_"})

    def __init__(self) -> None:
        super().__init__()
        self.added: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = next_sequence()
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.OPERATORS:
            self.added.update(range(before, next_sequence()))
        return result


def _leaf_ids(tensor: torch.Tensor) -> frozenset[int]:
    if tensor.grad_fn is None:
        return frozenset([id(tensor)])
    nodes, _, _ = collect([tensor.grad_fn])
    return frozenset(id(node.leaf) for node in nodes if node.is_leaf)


class Recorder:
    """Hooks every module for the length of one forward. After `trace`, `functions` holds the nodes of the graph.

    `count_flops` also records FLOPs and attention masks. `adds_in_place` says whether the model may add in place to
    views, `identities` whether a module that returns its input gets a graph node.
    """

    def __init__(
        self, model: nn.Module, count_flops: bool = True, adds_in_place: bool = True, identities: bool = False
    ) -> None:
        self.model, self.identities = model, identities
        self.returned: set[str] = set()
        self.calls: list[Call] = []
        self.stack: list[tuple[str, int, int, torch.Size | None, int]] = []
        self.handles: list[RemovableHandle] = []
        self.flops = _FlopMode()
        self.anchors: dict[torch.device, torch.Tensor] = {}
        self.functions: tuple[Any, ...] = ()
        self.masked: dict[int, frozenset[int]] = {}
        self.kernel_by_weight: set[str] = set()
        self.counts, self.additions = count_flops, _AdditionMode()
        counting: tuple[Any, ...] = (
            (_KernelMode(self._note_mask, self._note_product), self.flops) if count_flops else ()
        )
        self.modes = (*counting, self.additions) if adds_in_place else counting
        self.sharded = any(hasattr(module, "set_unshard_in_backward") for module in model.modules())
        self.stand_ins: dict[int, str] = {}
        self.frozen: list[torch.Tensor] = []

    def _note_mask(self, mask: torch.Tensor) -> None:
        leaves = _leaf_ids(mask)
        for _, _, index, *_ in self.stack:
            self.masked[index] = self.masked.get(index, frozenset()) | leaves

    def _note_product(self) -> None:
        if self.stack:
            self.kernel_by_weight.add(self.stack[-1][0])

    def __enter__(self) -> Recorder:
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            self.handles.append(
                module.register_forward_pre_hook(self._enter_hook(name), prepend=True, with_kwargs=True)
            )
            self.handles.append(module.register_forward_hook(self._exit_hook(_has_state(module))))
            if self.sharded and module._parameters:
                self.handles.append(module.register_forward_pre_hook(self._stand_in_hook(name)))
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*exc)
        for handle in self.handles:
            handle.remove()
        for parameter in self.frozen:
            parameter.requires_grad_(False)

    def _enter_hook(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            index = len(self.calls)
            self.calls.append(Call(index, name, 0, 0, self.stack[-1][2] if self.stack else -1))
            counted = len(self.flops.records)
            self.stack.append((name, next_sequence(), index, _first_shape((args, kwargs)), counted))

        return enter

    def _stand_in_hook(self, name: str) -> Any:
        """Note the gathered tensors that a module under `fully_shard` uses instead of its parameters."""

        def note(module: nn.Module, args: Any) -> None:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    self.stand_ins.setdefault(id(parameter), f"{name}.{attribute}" if name else attribute)
                    self._record_frozen(parameter)

        return note

    def _record_frozen(self, parameter: torch.Tensor) -> None:
        if self.counts and not parameter.requires_grad and parameter.is_floating_point() and is_unsharded(parameter):
            self.frozen.append(parameter.requires_grad_(True))

    def _exit_hook(self, has_state: bool) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            name, start, index, shape, counted = self.stack.pop()
            connected = self._connected(output) if has_state else self._own(output, args, name)
            call, reshapes = self.calls[index], _first_shape(output) != shape
            if self.counts and len(self.flops.records) == counted:
                self._count_opaque(module, output)
            made = _made_by(output if connected is None else connected)
            end = next_sequence()
            self.calls[index] = dataclasses.replace(call, start=start, end=end, reshapes=reshapes, outputs=made)
            return connected

        return leave

    def _count_opaque(self, module: nn.Module, output: Any) -> None:
        """Count a linear layer without known operators (packed weights, foreign kernels) as a plain matrix product."""
        width, function = getattr(module, "in_features", None), getattr(output, "grad_fn", None)
        if isinstance(width, int) and function is not None and hasattr(module, "out_features"):
            self.flops.records.append((sequence_of(function), 2 * output.numel() * width))

    def _connected(self, output: Any) -> Any:
        """The output with a graph node of its own, if frozen parameters gave it none (frozen embeddings); else None."""
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.grad_fn is None:
            return output + self._anchor(output.device).to(output.dtype)
        return None

    def _own(self, output: Any, args: Any, name: str) -> Any:
        """The output with a graph node of its own, if it is an argument; else None."""
        own = own_output(output, args) if self.identities else output
        if own is output:
            return None
        self.returned.add(name)
        return own

    def _anchor(self, device: torch.device) -> torch.Tensor:
        if device not in self.anchors:
            self.anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self.anchors[device]

    def trace(self, outputs: Any) -> Trace:
        functions = [t.grad_fn for t in tensors_in(outputs) if t.grad_fn is not None]
        if not functions:
            raise DiscoveryError(
                f"No output of {type(self.model).__name__}.forward depends on a differentiable tensor, so there is no "
                "residual stream to follow. Check whether the forward runs under torch.no_grad or returns no tensors."
            )
        nodes, roots, self.functions = collect(functions, self.additions.added)
        call_of = innermost_call(nodes, self.calls)
        flops = _sum_by_key(self.flops.records)
        index = {function: node.index for function, node in zip(self.functions, nodes, strict=True)}
        by_key: dict[str, set[int]] = {}
        for key, tensor in outputs_by_key(outputs):
            if tensor.grad_fn is not None:
                by_key.setdefault(key, set()).add(index[tensor.grad_fn])
        keys = {key: frozenset(made) for key, made in by_key.items()}
        first = min((call.start for call in self.calls), default=0)
        held = (tensor.grad_fn for _, tensor in held_by_modules(self.model) if tensor.grad_fn is not None)
        return Trace(
            nodes, tuple(self.calls), roots, flops, call_of, learned_masks=self.masked, stand_ins=self.stand_ins,
            kernel_by_weight=frozenset(self.kernel_by_weight), outputs=keys, identities=frozenset(self.returned),
            modules_hold_tensors=any(sequence_of(function) >= first for function in held),
        )  # fmt: skip


def _made_by(output: Any) -> tuple[int, ...]:
    """Sequence numbers of the nodes that created the differentiable tensors of an output, in order; -1 if none did."""
    tensors = filter(is_differentiable, tensors_in(output))
    return tuple(-1 if t.grad_fn is None else sequence_of(t.grad_fn) for t in tensors)


def _first_shape(value: Any) -> torch.Size | None:
    return next((t.shape for t in tensors_in(value) if t.is_floating_point()), None)


def _has_state(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None or next(module.buffers(), None) is not None


def _sum_by_key(records: Sequence[tuple[int, int]]) -> dict[int, int]:
    total = Counter[int]()
    for key, count in records:
        total[key] += count
    return total
