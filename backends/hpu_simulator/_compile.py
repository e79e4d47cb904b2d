"""`torch.compile(backend="hpu_backend")` on the simulated HPU, in eager mode.

Each graph from dynamo and AOT autograd runs unchanged as one region: one launch of one recipe. The number of graphs and
the time of their compilation are simulated; the work of Gaudi's compiler is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import register_backend
from torch._dynamo.device_interface import DeviceInterface, register_interface_for_device
from torch._functorch._aot_autograd.utils import make_boxed_func

from ._session import count_graph, extension

Compiled = Callable[..., Any]


def _compiler(kind: str) -> Callable[[torch.fx.GraphModule, Sequence[Any]], Compiled]:
    def compile_graph(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        count_graph(kind)
        return make_boxed_func(_as_region(graph.forward))

    return compile_graph


def _as_region(function: Compiled) -> Compiled:
    def run(*args: Any) -> Any:
        extension().begin_region()
        try:
            return function(*args)
        finally:
            extension().end_region()

    return run


def hpu_backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor], **_: Any) -> Compiled:
    """The dynamo backend. It accepts the options of the real one and ignores them."""
    compiled: Compiled = aot_autograd(
        fw_compiler=_compiler("forward"),
        bw_compiler=_compiler("backward"),
        inference_compiler=_compiler("inference"),
        keep_inference_input_mutations=True,
    )(graph, example_inputs)
    return compiled


class HpuInterface(DeviceInterface):
    """The interface that dynamo requires of a device."""

    device = torch.get_device_module("hpu").device
    Event = torch.get_device_module("hpu").Event
    Stream = torch.get_device_module("hpu").Stream

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: Any) -> None:
        torch.get_device_module("hpu").set_device(device)

    @staticmethod
    def device_count() -> int:
        return int(torch.get_device_module("hpu").device_count())

    @staticmethod
    def current_stream() -> torch.Stream:
        return torch.accelerator.current_stream(torch.device("hpu", 0))

    @staticmethod
    def synchronize(device: Any = None) -> None:
        torch.get_device_module("hpu").synchronize()

    @staticmethod
    def get_compute_capability(device: Any = None) -> str:
        return str(torch.get_device_module("hpu").get_device_capability())

    @staticmethod
    def is_bf16_supported(including_emulation: bool = False) -> bool:
        return True


def register() -> None:
    """Register the backend and the device with dynamo."""
    register_interface_for_device("hpu", HpuInterface)
    register_backend(name="hpu_backend", compiler_fn=hpu_backend)
