"""HPU: Intel Gaudi, in lazy and in eager mode.

Importing this module does not import `habana_frameworks`; the first call that needs it does. It reads its environment
variables once, so they must be set before that. `docs/devices.md` says what the modes mean for DropBP.

Sources: docs.habana.ai, and the HabanaAI/gaudi-pytorch-bridge repository.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropbp.device import JSON, Availability, DeviceDefaults, replayed_modules
from dropbp.errors import DeviceError

# Lazy: with step boundaries around each layer, and optimizer and clipping split by branch (`dropbp.lazy.grouping`), no
# graph depends on the whole mask and skipped parameters do not move. Eager: nothing is recorded, so none is needed.
DEFAULTS = {"lazy": DeviceDefaults(boundary="layer", group_parameters=True), "eager": DeviceDefaults()}

_GRAPHS_MODULE = "habana_frameworks.torch.hpu.graphs"
_DRIVER_VERSION = Path("/sys/module/habanalabs/version")


def create_device(index: int | None) -> HpuDevice:
    """The adapter. Index None means the process's device; Gaudi gives each process one."""
    return HpuDevice(index)


class HpuDevice:
    """One Gaudi accelerator."""

    name = "hpu"

    def __init__(self, index: int | None = None) -> None:
        self.index = index

    def is_available(self) -> Availability:
        """Whether Gaudi's software can be imported and sees a device."""
        try:
            hpu = _torch_hpu()
        except DeviceError as error:
            return Availability(False, str(error))
        if not hpu.is_available():
            return Availability(False, "habana_frameworks is installed but finds no device")
        if self.index is not None and self.index >= hpu.device_count():
            return Availability(False, f"index {self.index} was asked for; there are {hpu.device_count()} devices")
        return Availability(True)

    def synchronize(self) -> None:
        """Launch the recorded graph and wait until it is done."""
        self.step_boundary()
        _torch_hpu().synchronize()

    def step_boundary(self) -> None:
        """Call `htcore.mark_step()` in lazy mode; do nothing in eager mode."""
        if self.is_lazy():
            _habana("core").mark_step()

    def is_lazy(self) -> bool:
        """The mode that Gaudi's software reports; its default has changed between releases."""
        return bool(_habana("utils.internal").is_lazy())

    def memory_allocated_bytes(self) -> int:
        """Bytes in use on the device, workspace of graphs included. Synchronize first: lazy work is not yet counted."""
        return self._memory("InUse")

    def max_memory_allocated_bytes(self) -> int:
        """Peak bytes in use since `reset_peak_memory`."""
        return self._memory("MaxInUse")

    def memory_limit_bytes(self) -> int:
        """Bytes that can be used."""
        return self._memory("Limit")

    def reset_peak_memory(self) -> None:
        """Start a new peak measurement."""
        _torch_hpu().reset_peak_memory_stats()

    def describe(self) -> dict[str, JSON]:
        """Generation, mode, memory, and the versions of PyTorch, Gaudi's software and its driver."""
        hpu = _torch_hpu()
        return {
            "name": self.name,
            "generation": str(hpu.get_device_name()),
            "mode": self._mode(),
            "devices": int(hpu.device_count()),
            "torch": torch.__version__,
            "habana_torch_plugin": _plugin_version(),
            "driver": _driver_version(),
            "memory_limit_bytes": self.memory_limit_bytes(),
            "memory_is": "in use on the device, workspace of graphs included",
        }

    def compile_count(self) -> int:
        """Graphs compiled, by Gaudi's own `graph_compilation` metric; in eager mode single operations count too."""
        metric = _habana("hpu.metrics").metric_global("graph_compilation")
        if metric is None:
            raise DeviceError(
                "Gaudi's software has no metric 'graph_compilation', which counts compiled graphs. It is registered by "
                "habana_frameworks.torch.hpu.metrics since release 1.8; install a later one."
            )
        return int(dict(metric.stats())["TotalNumber"])

    def generator_state(self) -> torch.Tensor:
        """The state of the device's generator."""
        state: torch.Tensor = _torch_hpu().random.get_rng_state()
        return state

    def set_generator_state(self, state: torch.Tensor) -> None:
        """Restore the device's generator."""
        _torch_hpu().random.set_rng_state(state)

    def defaults(self) -> DeviceDefaults:
        """The defaults of the present mode: see `DEFAULTS`."""
        return DEFAULTS[self._mode()]

    def check_model(self, model: nn.Module) -> None:
        """Refuse HPU graphs: see `refuse_hpu_graphs`."""
        refuse_hpu_graphs(model)

    def _mode(self) -> str:
        return "lazy" if self.is_lazy() else "eager"

    def _memory(self, key: str) -> int:
        return int(_torch_hpu().memory_stats()[key])


def refuse_hpu_graphs(model: nn.Module) -> None:
    """Refuse a model with HPU graphs.

    Raises:
        DeviceError: the model, or a module in it, runs through `wrap_in_hpu_graph`, `ModuleCacher` or
            `make_graphed_callables`.
    """
    wrapped = replayed_modules(model, _GRAPHS_MODULE)
    if wrapped:
        raise DeviceError(
            f"module {wrapped[0]!r} runs as an HPU graph ({len(wrapped)} such modules in the model). An HPU graph "
            "replays one recorded sequence of operations, so every step would repeat the mask of the recording. "
            "Enable DropBP on the model as it was before wrap_in_hpu_graph, ModuleCacher or make_graphed_callables "
            "(GaudiTrainer: use_hpu_graphs_for_training=False), or train without DropBP."
        )


def _torch_hpu() -> Any:
    _habana("hpu")
    return torch.get_device_module("hpu")


def _habana(name: str) -> Any:
    try:
        return importlib.import_module(f"habana_frameworks.torch.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("habana_frameworks"):
            raise DeviceError(f"Gaudi's software is not installed here ({error})") from error
        raise DeviceError(f"Gaudi's software cannot be imported: {error!r}") from error
    except Exception as error:  # a broken driver or an incompatible PyTorch can raise anything
        raise DeviceError(f"Gaudi's software cannot be imported: {error!r}") from error


def _plugin_version() -> str | None:
    try:
        return importlib.metadata.version("habana-torch-plugin")
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    try:
        return _DRIVER_VERSION.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
