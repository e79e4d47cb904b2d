"""CUDA: statistics of the caching allocator, and graphs counted by `torch.compile`.

Written for the A100 class and later (compute capability 8.0 and up); older GPUs work if PyTorch supports them.

Captured graphs: a CUDA graph is one fixed sequence of kernels and would repeat the mask of its recording. So models
with captured modules are refused, and a training forward may be captured only under a fixed mask. A model compiled as a
whole has one graph per mask; compile by region instead, where a dropped region is merely called without gradients.

Streams: nothing here creates a stream or waits for one. Dropped and kept branches run in the current stream, as they
    would without DropBP, and autograd runs a backward in the stream of its forward.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropbp.device import CAPTURE_ADVICE, JSON, Availability, DeviceDefaults, dynamo_graph_count, replayed_modules
from dropbp.errors import DeviceError

_DRIVER_VERSION = Path("/proc/driver/nvidia/version")
_AMD_DRIVER_VERSION = Path("/sys/module/amdgpu/version")
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # such as expandable_segments:True
_FULL_SUPPORT_FROM = (8, 0)
_GRAPHS_MODULE = "torch.cuda.graphs"


def create_device(index: int | None) -> CudaDevice:
    """The adapter of one GPU. Index None means PyTorch's current one at the time of each call."""
    return CudaDevice(index)


class CudaDevice:
    """One GPU, with PyTorch's caching allocator."""

    name = "cuda"

    def __init__(self, index: int | None = None) -> None:
        self.index = index

    def is_available(self) -> Availability:
        """Whether PyTorch sees this GPU; if not, whether the build, the driver or the index is the cause."""
        if torch.version.cuda is None and torch.version.hip is None:
            return Availability(False, f"PyTorch {torch.__version__} is built without CUDA or ROCm")
        if not torch.cuda.is_available():
            return Availability(False, f"PyTorch is built with {platform()} and finds no usable GPU or driver")
        count = torch.cuda.device_count()
        if self.index is not None and self.index >= count:
            return Availability(False, f"index {self.index} was asked for; there are {count} GPUs, counted from 0")
        return Availability(True)

    def synchronize(self) -> None:
        """Wait until the GPU has done all work of this process."""
        torch.cuda.synchronize(self.index)

    def step_boundary(self) -> None:
        """Does nothing: kernels are launched as they are called."""

    def is_lazy(self) -> bool:
        """Always False."""
        return False

    def memory_allocated_bytes(self) -> int:
        """Bytes of live tensors on this GPU."""
        return torch.cuda.memory_allocated(self.index)

    def max_memory_allocated_bytes(self) -> int:
        """Peak bytes of live tensors since `reset_peak_memory`, scratch memory of kernels included."""
        return torch.cuda.max_memory_allocated(self.index)

    def memory_limit_bytes(self) -> int:
        """The GPU's memory, or the share of it that this process may use (`set_per_process_memory_fraction`)."""
        return int(self._properties().total_memory * torch.cuda.get_per_process_memory_fraction(self.index))

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        torch.cuda.reset_peak_memory_stats(self.index)

    def describe(self) -> dict[str, JSON]:
        """GPU, compute capability, memory, and the versions of PyTorch, CUDA or ROCm, cuDNN and the driver."""
        properties = self._properties()
        capability = (int(properties.major), int(properties.minor))
        return {
            "name": self.name,
            "platform": platform(),
            "index": self._index(),
            "generation": str(properties.name),
            "compute_capability": f"{capability[0]}.{capability[1]}",
            "a100_class_or_later": torch.version.hip is None and capability >= _FULL_SUPPORT_FROM,
            "multiprocessors": int(properties.multi_processor_count),
            "devices": torch.cuda.device_count(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": driver_version(),
            "allocator": torch.cuda.get_allocator_backend(),
            "allocator_settings": next(filter(None, map(os.environ.get, _ALLOCATOR_SETTINGS)), None),
            "memory_limit_bytes": self.memory_limit_bytes(),
            "memory_is": "tensors alive, by the caching allocator",
        }

    def compile_count(self) -> int:
        """Graphs that `torch.compile` has captured."""
        return dynamo_graph_count()

    def generator_state(self) -> torch.Tensor:
        """The state of this GPU's generator. Asking all GPUs would initialize them."""
        return torch.cuda.get_rng_state(self._index())

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore this GPU's generator."""
        torch.cuda.set_rng_state(state, self._index())

    def defaults(self) -> DeviceDefaults:
        """The defaults of a device that runs eagerly."""
        return DeviceDefaults()

    def check_model(self, model: nn.Module) -> None:
        """Refuse modules that run through `make_graphed_callables`.

        Raises:
            DeviceError: there is one; the message names it.
        """
        replayed = replayed_modules(model, _GRAPHS_MODULE)
        if replayed:
            raise DeviceError(
                f"module {replayed[0]!r} runs as a CUDA graph ({len(replayed)} such modules). {CAPTURE_ADVICE}"
            )

    def _index(self) -> int:
        return torch.cuda.current_device() if self.index is None else self.index

    def _properties(self) -> Any:
        return torch.cuda.get_device_properties(self._index())


def platform() -> str:
    """What `cuda` means in this build of PyTorch."""
    return "CUDA" if torch.version.hip is None else "ROCm"


def driver_version() -> str | None:
    """The driver's version as its kernel module reports it; None if it does not."""
    try:
        if torch.version.hip is not None:
            return _AMD_DRIVER_VERSION.read_text(encoding="utf-8", errors="replace").strip()
        words = _DRIVER_VERSION.read_text(encoding="utf-8", errors="replace").splitlines()[0].split()
    except (OSError, IndexError):
        return None
    return next((word for word in words if word[0].isdecimal() and "." in word), None)
