"""What the core must know about a device, and how it finds a device adapter by name.

An adapter is a module with a function `create_device(index)`. The built-in ones are in `dropbp.backends` and are
imported on first use, so that `import dropbp` loads no vendor software. Other packages add theirs through the entry
point group `dropbp.backends`. If you name a device, it is used or refused, never replaced by another.

The idea of adapters that are probed by name, with the reason for a negative probe, is from vLLM's `vllm/platforms`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch import nn

from dropbp.errors import DeviceError

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "dropbp.backends"
CAPTURE_ADVICE = (
    "A CUDA graph replays one recorded sequence of kernels, so every step would repeat the mask of the recording. "
    "Train without capture (dropbp.compile_blocks also saves launch overhead), or capture one graph per mask, under "
    "handle.fixed(mask)."
)
BUILT_IN_DEVICES = ("cpu", "cuda", "hpu", "meta")
ACCELERATORS = ("mlu", "mps", "mtia", "musa", "neuron", "npu", "sdaa", "tpu", "xla", "xpu")  # one adapter for all

_OTHER_NAMES = dict.fromkeys(("amd", "hip", "rocm"), "PyTorch calls AMD's GPUs 'cuda', with ROCm too. ")

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
Boundary: TypeAlias = Literal["none", "layer", "sublayer"]
Fill: TypeAlias = Literal["none", "zero"]


@dataclass(frozen=True)
class Availability:
    """The answer of a probe: truthy if the device can be used here; otherwise `reason` says why not."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


@dataclass(frozen=True)
class DeviceDefaults:
    """Defaults of a device in its present mode.

    Attributes:
        boundary: where the graph of a lazy device is cut, in forward and in backward.
        fill: the gradient of a skipped parameter. `none` leaves it None, so the optimizer does not move the parameter;
            `zero` fills it with zeros, so weight decay and momentum still do.
        group_parameters: whether optimizer and gradient clipping should work branch by branch.
    """

    boundary: Boundary = "none"
    fill: Fill = "none"
    group_parameters: bool = False


@runtime_checkable
class Device(Protocol):
    """Everything the core needs from a device. Memory is in bytes."""

    @property
    def name(self) -> str:
        """The name that finds the adapter: `cpu`, `cuda`, `hpu`, another of PyTorch's, or that of another package."""

    def is_available(self) -> Availability:
        """Whether the device can be used here; if not, the answer holds the reason."""

    def synchronize(self) -> None:
        """Wait until all queued work of the device is done."""

    def step_boundary(self) -> None:
        """Cut and launch the graph that a lazy device has recorded. Does nothing on other devices."""

    def is_lazy(self) -> bool:
        """Whether operations are recorded and run only at a step boundary."""

    def memory_allocated_bytes(self) -> int | None:
        """Bytes in use now; None if the device does not report it."""

    def max_memory_allocated_bytes(self) -> int | None:
        """Peak bytes in use since `reset_peak_memory`; None if the device does not report it."""

    def memory_limit_bytes(self) -> int | None:
        """Bytes that can be used; None if the device does not report it."""

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""

    def describe(self) -> dict[str, JSON]:
        """Name, generation, software versions, limits: what a result file must say about the device."""

    def compile_count(self) -> int:
        """Graphs compiled so far in this process; only differences are meaningful."""

    def generator_state(self) -> torch.Tensor:
        """The state of this device's random generator, for `set_generator_state`; empty if it has none."""

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore a state that `generator_state` returned."""

    def defaults(self) -> DeviceDefaults:
        """The defaults of this device in its present mode."""

    def check_model(self, model: nn.Module) -> None:
        """Raise a `DeviceError` with the reason if this device cannot train the model with dropped branches."""


DeviceLike: TypeAlias = "str | torch.device | Device"
DeviceFactory: TypeAlias = Callable[[int | None], Device]


def get_device(device: DeviceLike | None = None, model: nn.Module | None = None) -> Device:
    """The adapter of a device, ready for use.

    Args:
        device: a name such as `"cuda"` or `"cuda:1"`, a `torch.device`, or an object that is a `Device` already. It is
            never overridden, wherever the model is. A name without an index means the model's device of that name, else
            PyTorch's current one. None takes the model's device: see `model_device`.
        model: gives the device if `device` is None, and the index if `device` has none.

    Raises:
        DeviceError: the device is unknown or not available, or its adapter cannot be loaded. The message holds the
            reason and the known devices.
    """
    adapter = device if isinstance(device, Device) else _create_by_name(device, model)
    availability = adapter.is_available()
    if not availability:
        raise DeviceError(f"device {adapter.name!r} is not available here: {availability.reason}. {_known_sentence()}")
    return adapter


def available_devices() -> dict[str, Availability]:
    """Every known device, built-in or from an entry point, with the answer of its probe.

    A probe imports the vendor's software if that is installed.
    """
    return {name: _probe(name) for name in known_devices()}


def known_devices() -> tuple[str, ...]:
    """Names that `get_device` accepts: built-in ones, PyTorch's own, then those of other packages."""
    ours = (*BUILT_IN_DEVICES, *ACCELERATORS)
    return (*ours, *sorted({*_third_party_adapters(), *_registered_backend()} - {*ours}))


def model_device(model: nn.Module | None) -> torch.device:
    """The device of the model's first parameter, else first buffer, that holds data.

    So a model spread over several devices counts as on the device of its first part, in the order of
    `model.parameters()`. A model entirely on the meta device gives `meta`. A model without tensors, or None, gives
    `torch.get_default_device()`.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise DeviceError(f"model is {type(model).__name__}; pass a torch.nn.Module to ask for its device, or None.")
    tensors: list[torch.Tensor] = [] if model is None else list(itertools.chain(model.parameters(), model.buffers()))
    devices = [tensor.device for tensor in tensors] or [torch.get_default_device()]
    return next((device for device in devices if device.type != "meta"), devices[0])


def save_rng_state(model: nn.Module) -> Callable[[], None]:
    """Read the random states of the CPU and of the model's devices; the returned function restores them.

    Other devices are not touched: Gaudi's software refuses all but the process's own, and CUDA would initialize each
    GPU.
    """
    cpu = torch.get_rng_state()
    adapters = [get_device(device) for device in devices_of(model)]
    states = [adapter.generator_state() for adapter in adapters]

    def restore() -> None:
        torch.set_rng_state(cpu)
        for adapter, state in zip(adapters, states, strict=True):
            adapter.set_generator_state(state)

    return restore


@contextlib.contextmanager
def fork_rng(model: nn.Module) -> Iterator[None]:
    """Restore the random states of the CPU and of the model's devices afterwards."""
    restore = save_rng_state(model)
    try:
        yield
    finally:
        restore()


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices of a model's parameters and buffers that have a random generator of their own: not CPU, not meta."""
    found = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    return sorted((device for device in found if device.type not in ("cpu", "meta")), key=str)


def replayed_modules(model: nn.Module, graphs_module: str) -> list[str]:
    """Qualified names of the modules that run as recorded graphs; the model itself is `<model>`.

    Args:
        model: the root module.
        graphs_module: the vendor's Python module that records and replays graphs, such as `torch.cuda.graphs`.
    """
    return [name or "<model>" for name, module in model.named_modules() if _is_replayed(module, graphs_module)]


def _is_replayed(module: nn.Module, graphs_module: str) -> bool:
    comes_from = (_comes_from(value, graphs_module) for value in vars(module).values())
    return type(module).__module__ == graphs_module or any(comes_from)


def _comes_from(value: Any, graphs_module: str) -> bool:
    """Whether a function on a module was defined in that Python module, also inside wrappers."""
    function: Callable[..., Any] | None = getattr(value, "__func__", value)
    while function is not None:
        # not __module__: functools.wraps copies the __module__ of the wrapped function
        if getattr(function, "__globals__", {}).get("__name__") == graphs_module:
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def known_bytes(found: int | None, device: Device) -> int:
    """The value of a memory statistic.

    Raises:
        DeviceError: the device does not report it (`found` is None).
    """
    if found is None:
        raise DeviceError(f"Device {device.name!r} has no memory statistics, so memory cannot be measured on it.")
    return found


def refuse_capture() -> None:
    """Refuse to run inside the capture of a CUDA graph (also on ROCm).

    Raises:
        DeviceError: the current call is being captured.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise DeviceError(f"A training forward of an enabled model is being captured as a CUDA graph. {CAPTURE_ADVICE}")


def dynamo_graph_count() -> int:
    """Graphs that `torch.compile` has captured so far in this process, recompilations included.

    A graph may become one forward and one backward kernel program, which are compiled together and count once.
    """
    if "torch._dynamo.utils" not in sys.modules:  # nothing was compiled, and the import is slow
        return 0
    counters = sys.modules["torch._dynamo.utils"].counters
    return int(counters["stats"]["unique_graphs"])


def _create_by_name(device: str | torch.device | None, model: nn.Module | None) -> Device:
    name, index = _parse_name(model_device(model) if device is None else device)
    return _factory(name)(_model_index(name, model) if index is None else index)


def _model_index(name: str, model: nn.Module | None) -> int | None:
    devices = devices_of(model) if isinstance(model, nn.Module) else ()
    return next((device.index for device in devices if device.type == name), None)


def _parse_name(device: str | torch.device) -> tuple[str, int | None]:
    name, _, index = str(device).partition(":")
    if not name or (index and not index.isdecimal()):
        raise DeviceError(
            f"device {device!r} is not a device name; allowed is a name, or a name and an index as in 'cuda:1'. "
            f"{_known_sentence()}"
        )
    return name, int(index) if index else None


def _factory(name: str) -> DeviceFactory:
    third_party = _third_party_adapters()
    if name in BUILT_IN_DEVICES:
        adapter: Any = importlib.import_module(f"dropbp.backends.{name}")
    elif name in third_party:
        adapter = _load_third_party(name, third_party[name])
    elif name in ACCELERATORS or name in _registered_backend() or _is_device_of_torch(name):
        return partial(importlib.import_module("dropbp.backends.accelerator").create_device, name)
    else:
        raise DeviceError(
            f"no adapter for device {name!r}. {_known_sentence()} "
            f"{_OTHER_NAMES.get(name, '')}A package can add one by an entry point "
            f"{name!r} in the group {ENTRY_POINT_GROUP!r}."
        )
    return cast(DeviceFactory, getattr(adapter, "create_device", adapter))


def _registered_backend() -> tuple[str, ...]:
    """The device that another package has registered with PyTorch in this process, if any."""
    name = str(torch._C._get_privateuse1_backend_name())
    return () if name == "privateuseone" else (name,)


def _is_device_of_torch(name: str) -> bool:
    if name in _OTHER_NAMES:
        return False
    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


def _third_party_adapters() -> Mapping[str, EntryPoint]:
    return {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINT_GROUP)}


def _load_third_party(name: str, entry_point: EntryPoint) -> Any:
    try:
        adapter = entry_point.load()
    except Exception as error:  # a foreign import can fail in any way, and must not hide the other devices
        raise DeviceError(
            f"the adapter of device {name!r}, entry point {entry_point.value!r}, cannot be loaded: {error!r}. "
            "Repair or remove the package that declares it."
        ) from error
    if not callable(getattr(adapter, "create_device", adapter)):
        raise DeviceError(
            f"the adapter of device {name!r}, entry point {entry_point.value!r}, is a {type(adapter).__name__}; it "
            "must be a module with a function create_device(index), or such a function."
        )
    return adapter


def _probe(name: str) -> Availability:
    try:
        availability = _factory(name)(None).is_available()
    except DeviceError as error:
        availability = Availability(False, str(error))
    if not availability:
        logger.debug("device %s is not available: %s", name, availability.reason)
    return availability


def _known_sentence() -> str:
    return f"Known devices: {', '.join(known_devices())}."
