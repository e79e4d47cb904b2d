"""Makes a dropped branch use the same kernels as a recorded run.

PyTorch's attention selects another kernel if its mask requires a gradient (relative position biases, masks computed
from the input), and kernels differ in the last bits. A branch that runs without recording must use the kernel of the
recorded run, so its attention mask requires a gradient wherever the recorded one would. Some modules choose their
kernel by the grad mode (`nn.MultiheadAttention` in evaluation mode, recurrent layers). They are recorded even if their
branch is dropped, and their output is detached. Products with a weight that is frozen for this step use the kernel for
a trained weight: see `dropbp._torch.kernel_depends_on_weight`.

PyTorch's group norm for channels-last input on CPU writes the gradient of its input even if that requires none, and the
process dies. Below the lowest kept branch the input requires none where it does so in plain training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dropbp._torch import attention_mask, kernel_depends_on_weight
from dropbp.branch_sets import EVERY
from dropbp.engine.patch import Forward, WrapperState, named_forward
from dropbp.engine.runtime import Runtime
from dropbp.tensors import any_requires_grad, map_tensors


class MaskState(WrapperState):
    """A module whose attention mask is made from `parameters`; `dropping()` tells whether its branch is dropped now."""

    def __init__(self, parameters: Sequence[tuple[nn.Module, str]], dropping: Callable[[], bool]) -> None:
        self.parameters, self.dropping = parameters, dropping

    def differs(self) -> bool:
        """Whether this run is not recorded, but a recorded run would have a mask that requires a gradient."""
        if torch.is_grad_enabled() or not self.dropping():
            return False
        held = (module._parameters[attribute] for module, attribute in self.parameters)
        return any(p is not None and p.requires_grad for p in held)


class SameAttentionKernel(TorchFunctionMode):
    """Makes attention masks require a gradient, so that PyTorch selects the kernel of a recorded run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        mask = attention_mask(func, args, kwargs)
        if mask is None or not mask.is_floating_point():
            return func(*args, **kwargs)
        marked = mask.detach().requires_grad_(True)
        if len(args) > 3:
            return func(*args[:3], marked, *args[4:], **kwargs)
        return func(*args, **{**kwargs, "attn_mask": marked})


class SameMatmulKernel(TorchFunctionMode):
    """Frozen weights require a gradient inside products whose kernel that decides. The gradient goes nowhere."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.frozen = set(map(id, weights))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or not kernel_depends_on_weight(func, args, kwargs):
            return func(*args, **kwargs)
        records = torch.is_grad_enabled() and any_requires_grad(args, kwargs)
        with torch.enable_grad():
            outputs = func(*map(self._marked, args), **{name: self._marked(value) for name, value in kwargs.items()})
        return outputs if records else map_tensors(outputs, torch.Tensor.detach)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and (id(value) in self.frozen or id(value._base) in self.frozen):
            return value.detach().requires_grad_(True)
        return value


KERNEL_BY_MODE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.RNNBase)


class KernelState(WrapperState):
    """A module whose kernel depends on the grad mode; `dropping()` tells whether its branch is dropped now."""

    def __init__(self, dropping: Callable[[], bool]) -> None:
        self.dropping = dropping


def kernel_forward(original: Forward) -> Forward:
    """Wrap the forward of a module whose kernel depends on the grad mode."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: KernelState | None = self._dropbp_kernel
        if state is None or state.original is not original or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        if torch.is_grad_enabled() or not state.dropping():
            return original(self, *args, **kwargs)
        with torch.enable_grad():
            return map_tensors(original(self, *args, **kwargs), torch.Tensor.detach)

    return named_forward(forward)


def mask_forward(original: Forward) -> Forward:
    """Wrap the forward of a module whose attention mask is learned."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: MaskState | None = self._dropbp_mask
        if state is None or torch.compiler.is_compiling() or not state.differs():
            return original(self, *args, **kwargs)
        with SameAttentionKernel():
            return original(self, *args, **kwargs)

    return named_forward(forward)


class GroupNormState(WrapperState):
    """A module with a group norm, whose input must require a gradient on CPU."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def connected(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, requiring a gradient that goes nowhere."""
        on_cpu = tensor.device.type == "cpu" and tensor.is_floating_point()
        return self.runtime.connect(tensor, alone=True) if on_cpu else tensor


def group_norm_forward(original: Forward) -> Forward:
    """Wrap the forward of a module with a group norm."""

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: GroupNormState | None = self._dropbp_group_norm
        if state is None or state.original is not original or torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if not trains or state.runtime.plan_here().trained == EVERY:
            return original(self, *args, **kwargs)
        return original(self, *map_tensors(args, state.connected), **map_tensors(kwargs, state.connected))

    return named_forward(forward)
