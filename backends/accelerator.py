"""The adapter for every device that has no adapter of its own.

It asks the device's PyTorch module, such as `torch.xpu`, and otherwise `torch.accelerator`. Backends differ in what
they offer: memory without statistics is None, a missing random state is empty. XLA has no such module and records what
it runs, so it is asked through `torch_xla`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dropbp.device import JSON, Availability, DeviceDefaults, dynamo_graph_count

# A device from outside PyTorch becomes known when its package is imported.
PACKAGES = {
    "mlu": "torch_mlu",
    "musa": "torch_musa",
    "neuron": "torch_neuronx",
    "npu": "torch_npu",
    "sdaa": "torch_sdaa",
    "tpu": "torch_tpu",
    "xla": "torch_xla",
}
NOT_KNOWN = "not known: the backend has no statistics"


def create_device(name: str, index: int | None) -> AcceleratorDevice:
    """The adapter of the device with that name. Index None means PyTorch's current device at the time of each call."""
    return (XlaDevice if name == "xla" else AcceleratorDevice)(name, index)


class AcceleratorDevice:
    """One device, accessed through what its backend has registered with PyTorch."""

    def __init__(self, name: str, index: int | None = None) -> None:
        self.name, self.index = name, index

    def is_available(self) -> Availability:
        """Whether the backend's package, its PyTorch module and the device are present; if not, what is missing."""
        try:
            reason = self._missing()
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            reason = f"its software fails here: {error!r}"
        return Availability(not reason, reason)

    def synchronize(self) -> None:
        """Wait until the device has done all work of this process."""
        self._call(getattr(self._module(), "synchronize", None) or torch.accelerator.synchronize)

    def step_boundary(self) -> None:
        """Does nothing: operations are launched as they are called."""

    def is_lazy(self) -> bool:
        """Always False."""
        return False

    def memory_allocated_bytes(self) -> int | None:
        """Bytes of live tensors; None if the backend does not report it."""
        return _whole(self._ask("memory_allocated", "current_allocated_memory"))

    def max_memory_allocated_bytes(self) -> int | None:
        """Peak bytes of live tensors since `reset_peak_memory`; None if the backend does not report it."""
        return _whole(self._ask("max_memory_allocated"))

    def memory_limit_bytes(self) -> int | None:
        """The device's memory; None if the backend does not report it."""
        free_and_total = self._ask("mem_get_info", "get_memory_info")
        if free_and_total:
            return int(free_and_total[1])
        properties = self._ask("get_device_properties")
        return _whole(getattr(properties, "total_memory", None) or self._ask("recommended_max_memory"))

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement, if the backend has one."""
        self._ask("reset_peak_memory_stats")

    def describe(self) -> dict[str, JSON]:
        """Name, model, number of devices, memory, and the versions of PyTorch and the backend's package."""
        limit = self.memory_limit_bytes()
        package = PACKAGES.get(self.name)
        return {
            "name": self.name,
            "index": self.index,
            "generation": str(self._ask("get_device_name") or self.name),
            "devices": _whole(self._ask("device_count")),
            "torch": str(torch.__version__),
            "package": package and f"{package} {_version(package)}",
            "memory_limit_bytes": limit,
            "memory_is": "tensors alive, by the backend" if self.memory_allocated_bytes() is not None else NOT_KNOWN,
        }

    def compile_count(self) -> int:
        """Graphs that `torch.compile` has captured."""
        return dynamo_graph_count()

    def generator_state(self) -> torch.Tensor:
        """The state of this device's generator; empty if the backend has none."""
        state = self._ask("get_rng_state")
        return state if isinstance(state, torch.Tensor) else torch.empty(0, dtype=torch.uint8, device="cpu")

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore this device's generator."""
        if state.numel():
            self._call(self._module().set_rng_state, state)

    def defaults(self) -> DeviceDefaults:
        """The defaults of a device that runs eagerly."""
        return DeviceDefaults()

    def check_model(self, model: nn.Module) -> None:
        """Accept every model."""

    def _missing(self) -> str:
        """What is missing; empty if nothing is."""
        package = PACKAGES.get(self.name)
        if package is not None and find_spec(package) is None:
            return f"it needs the package {package}, which is not installed"
        if package is not None:
            importlib.import_module(package)
        if self._module() is None:
            return f"PyTorch {torch.__version__} has no module torch.{self.name}"
        if not self._module().is_available():
            return f"torch.{self.name}.is_available() is False: this build of PyTorch lacks it, or there is no device"
        count = int(self._ask("device_count") or 1)
        if self.index is not None and self.index >= count:
            return f"index {self.index} was asked for; the number of devices is {count}, counted from 0"
        return ""

    def _module(self) -> Any:
        return getattr(torch, self.name, None)

    def _ask(self, *names: str) -> Any:
        """Call the first of these functions that the device's module has, else `torch.accelerator`."""
        accelerator = torch.accelerator.current_accelerator()
        is_current = accelerator is not None and accelerator.type == self.name
        for place in (self._module(), torch.accelerator if is_current else None):
            for function in filter(None, (getattr(place, name, None) for name in names)):
                with suppress(NotImplementedError, RuntimeError):  # it exists, but not for this backend
                    return self._call(function)
        return None

    def _call(self, function: Callable[..., Any], *values: Any) -> Any:
        """Call the function with the device if it takes one; backends with a single device may not."""
        return function(*values, self._device()) if _takes(function, len(values) + 1) else function(*values)

    def _device(self) -> torch.device:
        return torch.device(self.name) if self.index is None else torch.device(self.name, self.index)


class XlaDevice(AcceleratorDevice):
    """PyTorch/XLA: lazy, like Gaudi, so its graphs are cut at layers.

    Source: https://docs.pytorch.org/xla, `torch_xla` and `torch_xla.core.xla_model`.
    """

    def synchronize(self) -> None:
        """Launch the recorded graph and wait until it is done."""
        self.step_boundary()
        self._model().wait_device_ops()

    def step_boundary(self) -> None:
        """Launch the recorded graph."""
        self._module().sync()

    def is_lazy(self) -> bool:
        """Always True."""
        return True

    def memory_allocated_bytes(self) -> int | None:
        """Bytes in use, if the runtime reports them."""
        return self._memory("bytes_used")

    def max_memory_allocated_bytes(self) -> int | None:
        """None: the runtime's peak cannot be reset."""
        return None

    def memory_limit_bytes(self) -> int | None:
        """Bytes that can be used, if the runtime reports them."""
        return self._memory("bytes_limit")

    def compile_count(self) -> int:
        """Graphs that XLA has compiled."""
        compiled = importlib.import_module("torch_xla.debug.metrics").metric_data("CompileTime")
        return int(compiled[0]) if compiled else 0

    def generator_state(self) -> torch.Tensor:
        """XLA's seed."""
        return torch.tensor([self._model().get_rng_state()], device="cpu")

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore XLA's seed."""
        self._model().set_rng_state(int(state))

    def defaults(self) -> DeviceDefaults:
        """As on a lazy Gaudi: no graph depends on the whole mask, and skipped parameters do not move."""
        return DeviceDefaults(boundary="layer", group_parameters=True)

    def _missing(self) -> str:
        if find_spec("torch_xla") is None:
            return "it needs the package torch_xla, which is not installed"
        count = int(self._module().device_count())
        index = self.index or 0
        return "" if index < count else f"index {index} was asked for; the number of devices is {count}, counted from 0"

    def _module(self) -> Any:
        return importlib.import_module("torch_xla")

    def _model(self) -> Any:
        return importlib.import_module("torch_xla.core.xla_model")

    def _memory(self, key: str) -> int | None:
        return _whole(self._model().get_memory_info(str(self._module().device(self.index))).get(key))


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function takes this many positional arguments; yes if its signature is unknown."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "of unknown version"))
