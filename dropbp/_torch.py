"""Uses of PyTorch internals.

`torch.compile` works frame by frame: it traces a frame, or skips it and looks at the frames it calls. The functions
here make it skip a function of this library, or switch it off while this library decides what a step drops. They do not
import the compiler, which takes seconds.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

Callback = Any
T = TypeVar("T")
_frames: Any = torch._C._dynamo.eval_frame


def never_compile(function: Callable[..., Any]) -> None:
    """Skip this function's frame; what it calls is still compiled (`torch.compiler.disable(recursive=False)`)."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    if hasattr(_frames, "skip_code"):  # torch 2.6
        _frames.skip_code(function.__code__)
        return
    skip, default = _frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT
    _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, default))


def pause_compiler() -> Callback:
    """Stop compiling in this thread. Returns the value for `resume_compiler`; None if nothing would have compiled."""
    return _frames.set_eval_frame(None)


def resume_compiler(callback: Callback) -> None:
    """Undo the `pause_compiler` that returned `callback`."""
    if callback is not None:
        _frames.set_eval_frame(callback)


def call_compiled(callback: Callback, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a function, inside a `pause_compiler`, as if the compiler were not paused."""
    if callback is None:
        return function(*args, **kwargs)
    _frames.set_eval_frame(callback)
    try:
        return function(*args, **kwargs)
    finally:
        _frames.set_eval_frame(None)


class _CompiledCodeOff:
    """Runs compiled code eagerly while at least one user is inside.

    The stance is global to the process. If each of two overlapping threads saved and restored it, the second would
    restore the eager stance for good. So the first thread in sets it, and the last one out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stance = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._stance.close()


_compiled_code_off = _CompiledCodeOff()


def compiled_code_off() -> AbstractContextManager[None]:
    """Run compiled modules eagerly inside the context, in every thread, so that autograd records their full graph."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import is slow
        return contextlib.nullcontext()
    return _compiled_code_off


def attention_mask(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """The mask in a call of `scaled_dot_product_attention`; None without a mask, or for any other function."""
    if func is not nn.functional.scaled_dot_product_attention:
        return None
    return args[3] if len(args) > 3 else kwargs.get("attn_mask")


_PRODUCTS = frozenset({nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__})


def kernel_depends_on_weight(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the kernel of this call depends on whether its weight requires a gradient.

    PyTorch multiplies rows that are not contiguous as one matrix if the weight requires one, and in batches
    otherwise (`should_fold` in ATen's LinearAlgebra.cpp); the two differ in the last bits.
    """
    if func is nn.functional.multi_head_attention_forward:
        return True  # it multiplies inside
    operands = [*args, *kwargs.values()][:2]
    if func not in _PRODUCTS or not all(isinstance(operand, torch.Tensor) for operand in operands):
        return False
    smaller, larger = sorted(operands, key=torch.Tensor.dim)
    return larger.dim() >= 3 and smaller.dim() <= 2 and _is_dense(larger) and not _is_packed(larger)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the tensor has strides: sparse and nested ones have none."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_packed(tensor: torch.Tensor) -> bool:
    """Like `is_contiguous`, but the strides of dimensions of size 1 count: other batches have more rows."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= max(size, 1)
    return True


def uncompiled(function: Callable[[], T]) -> T:
    """Call a function of this library with the compiler off."""
    callback = pause_compiler()
    try:
        return function()
    finally:
        resume_compiler(callback)


def next_sequence() -> int:
    """The sequence number of the next autograd node of this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def transforming() -> bool:
    """Whether a `torch.func` transform is active: it exposes no graph, and needs no connected one."""
    return bool(torch._C._are_functorch_transforms_active())


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor detached from the graph, with its forward-mode tangent, which `detach` would drop."""
    tangent = forward_ad.unpack_dual(tensor).tangent if forward_ad._current_level >= 0 else None
    return tensor.detach() if tangent is None else forward_ad.make_dual(tensor.detach(), tangent).clone()


for _own in (pause_compiler, resume_compiler, call_compiled, uncompiled):
    never_compile(_own)
