"""CPU. Its memory is the resident set of the process, which the operating system rounds and shares.

For byte-exact figures of tensors alone, use `dropbp.memory.track_tensor_bytes`.
"""

from __future__ import annotations

import platform
import threading
import weakref
from pathlib import Path

import psutil
import torch
from torch import nn

from dropbp.device import JSON, Availability, DeviceDefaults, dynamo_graph_count

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CPU_INFO = Path("/proc/cpuinfo")
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SAMPLE_EVERY_S = 0.005


def create_device(index: int | None) -> CpuDevice:
    """The adapter. A process has one CPU device, so the index is not used."""
    return CpuDevice()


class CpuDevice:
    """The host, with PyTorch's own kernels."""

    name = "cpu"

    def __init__(self) -> None:
        self._sampler: ResidentSampler | None = None

    def is_available(self) -> Availability:
        """Always available."""
        return Availability(True)

    def synchronize(self) -> None:
        """Does nothing: operations have finished when they return."""

    def step_boundary(self) -> None:
        """Does nothing: operations run when they are called."""

    def is_lazy(self) -> bool:
        """Always False."""
        return False

    def memory_allocated_bytes(self) -> int:
        """The process's resident set."""
        return resident_bytes()

    def max_memory_allocated_bytes(self) -> int:
        """The largest resident set since `reset_peak_memory`, or since the process began if that was never called.

        This is Linux's high-water mark if it can be reset, else the largest of samples taken every 5 ms, which can miss
        a short peak. `describe` says which.
        """
        if self._sampler is not None:
            return self._sampler.peak_bytes()
        return high_water_bytes() or resident_bytes()

    def memory_limit_bytes(self) -> int:
        """The machine's memory, or the control group's limit if that is lower."""
        limits = [psutil.virtual_memory().total, *map(_cgroup_limit_bytes, _CGROUP_LIMITS)]
        return int(min(limit for limit in limits if limit))

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        self._sampler = None if reset_high_water() else ResidentSampler()

    def describe(self) -> dict[str, JSON]:
        """Processor, vector instructions used by PyTorch, cores, threads, memory, and how its peak is measured."""
        return {
            "name": self.name,
            "generation": processor_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "memory_limit_bytes": self.memory_limit_bytes(),
            "memory_is": "resident set of the process",
            "peak_is": "5 ms samples" if high_water_bytes() is None or self._sampler else "high-water mark",
        }

    def compile_count(self) -> int:
        """Graphs that `torch.compile` has captured."""
        return dynamo_graph_count()

    def generator_state(self) -> torch.Tensor:
        """The state of PyTorch's CPU generator."""
        return torch.get_rng_state()

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore PyTorch's CPU generator."""
        torch.set_rng_state(state)

    def defaults(self) -> DeviceDefaults:
        """The defaults of a device that runs eagerly."""
        return DeviceDefaults()

    def check_model(self, model: nn.Module) -> None:
        """Accept every model."""


class ResidentSampler:
    """The largest resident set that a background thread samples every few milliseconds, until this object is freed."""

    def __init__(self, every_s: float = _SAMPLE_EVERY_S) -> None:
        self._peak_bytes = resident_bytes()
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)
        arguments = (weakref.ref(self), self._stop, every_s)
        threading.Thread(target=_sample_until_stopped, args=arguments, name="dropbp-memory", daemon=True).start()

    def sample(self) -> None:
        """Read the resident set once."""
        self._peak_bytes = max(self._peak_bytes, resident_bytes())

    def peak_bytes(self) -> int:
        """The largest resident set seen."""
        self.sample()
        return self._peak_bytes


def _sample_until_stopped(reference: weakref.ref[ResidentSampler], stop: threading.Event, every_s: float) -> None:
    while not stop.wait(every_s):
        sampler = reference()
        if sampler is None:
            return
        sampler.sample()
        del sampler  # if the thread kept it while waiting, it would never be freed


def resident_bytes() -> int:
    """The process's resident set in bytes."""
    return int(psutil.Process().memory_info().rss)


def high_water_bytes() -> int | None:
    """The largest resident set since the last reset, in bytes; None if the system does not report it."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if kibibytes is None else int(kibibytes) * 1024


def reset_high_water() -> bool:
    """Set the system's high-water mark to the current resident set; return False if that is not allowed.

    Source: Linux, `Documentation/filesystems/proc.rst`, value 5 of `clear_refs`.
    """
    if high_water_bytes() is None:
        return False
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def processor_name() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _cgroup_limit_bytes(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return int(text) if text.isdecimal() else None  # "max" means no limit
