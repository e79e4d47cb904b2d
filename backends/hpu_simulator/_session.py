"""Installs the simulated HPU in a process, and reads its counts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dropbp.errors import ConfigError, DeviceError

from . import _build
from ._report import Report, StepCount

MODE_VARIABLE = "PT_HPU_LAZY_MODE"
MAX_OPS_VARIABLE = "PT_HPU_MAX_COMPOUND_OP_SIZE"
DEFAULT_MEMORY = "96GiB"
UNLIMITED_OPS = 2**63 - 1
DEVICE_COUNT = 8  # cards that the machine reports; as on Gaudi, a process has one of them and calls it hpu:0
OTHER_ACCELERATORS_VARIABLE = "CUDA_VISIBLE_DEVICES"  # ROCm reads it as well
PACKAGE = "habana_frameworks"
PACKAGE_DIR = Path(__file__).resolve().parent / PACKAGE

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class _State:
    """The state of the simulation in this process, which has one device."""

    def __init__(self) -> None:
        self.extension: ModuleType | None = None
        self.lazy = True
        self.steps: list[StepCount] = []
        self.before_step: Mapping[str, Any] = {}
        self.graphs: dict[str, int] = {}


_state = _State()


def install(*, lazy: bool | None = None, memory: int | str = DEFAULT_MEMORY, max_ops: int | None = None) -> None:
    """Install the simulated HPU in this process. Calling it again with the same mode only sets the memory limit.

    Args:
        lazy: lazy or eager mode; None uses `PT_HPU_LAZY_MODE`, and lazy mode if that is not set.
        memory: device memory, in bytes or as text such as `"96GiB"`.
        max_ops: largest number of operators in a lazy graph; None uses `PT_HPU_MAX_COMPOUND_OP_SIZE`, else no limit.

    Writes two variables into this process's environment: `PT_HPU_LAZY_MODE`, which Gaudi's software and transformers
    read, and an empty `CUDA_VISIBLE_DEVICES`. PyTorch supports one accelerator per process, so GPUs are hidden, and a
    build of PyTorch with CUDA behaves like one without.

    Raises:
        DeviceError: there is no compiler, real Gaudi software is in the same process, the simulator runs in the other
            mode, or it is too late: something has already found out that there is no HPU, or used a GPU.
    """
    lazy = _lazy_from_environment() if lazy is None else lazy
    limit = parse_bytes(memory)
    if is_installed():
        _check_same_mode(lazy)
    else:
        _refuse_real_software()
        _refuse_late_install()
        _hide_gpus()
        os.environ[MODE_VARIABLE] = "1" if lazy else "0"
        _start(lazy, _max_ops_from_environment() if max_ops is None else max_ops)
    set_memory_limit(limit)


def _start(lazy: bool, max_ops: int) -> None:
    extension = _build.load()
    extension.be_the_only_accelerator()
    _check_hooks()
    _state.extension, _state.lazy = extension, lazy
    extension.configure(lazy, max_ops)
    _expose_habana_frameworks()
    _count_optimizer_steps()
    reset()


def is_installed() -> bool:
    """Whether this process runs on the simulated HPU."""
    return _state.extension is not None


def extension() -> Any:
    """The loaded C++ module. Raises :class:`DeviceError` before :func:`install`."""
    if _state.extension is None:
        raise DeviceError(
            "The simulated HPU is not in this process. Call dropbp.backends.hpu_simulator.install() first, or start "
            "the script with: python -m dropbp.backends.hpu_simulator SCRIPT"
        )
    return _state.extension


def is_lazy() -> bool:
    """Whether the simulation runs in lazy mode."""
    return _state.lazy


def set_memory_limit(memory: int | str) -> None:
    """Set the device's memory, in bytes or as text such as `"512MiB"`. Memory in use is not freed."""
    extension().set_memory_limit(parse_bytes(memory))


def memory_stats() -> dict[str, int]:
    """Device memory in bytes, under the names of `torch.hpu.memory_stats()`."""
    return dict(extension().memory_stats())


def counters() -> dict[str, Any]:
    """Totals since :func:`reset`: `recipes`, `misses`, `hits`, `launches`, `ops`, `host_reads`, `flushes`."""
    return dict(extension().counters())


def recipes() -> list[dict[str, Any]]:
    """Every recipe compiled: `key`, `ops`, `names` (of its operators), `live_outputs`, `launches`, `first_flush`."""
    return list(extension().recipes())


def compiled_graphs() -> dict[str, int]:
    """Graphs passed to `torch.compile(backend="hpu_backend")`: `forward`, `backward`, `inference`."""
    return dict(_state.graphs)


def count_graph(kind: str) -> None:
    """Count a graph that the compiler backend receives."""
    _state.graphs[kind] = _state.graphs.get(kind, 0) + 1


def mark_step_done(*_: Any) -> None:
    """End a step of the report. Runs automatically after every `optimizer.step()`."""
    now = counters()
    _state.steps.append(
        StepCount(
            recompiles=now["misses"] - _state.before_step["misses"],
            launches=now["launches"] - _state.before_step["launches"],
            host_reads=now["host_reads"] - _state.before_step["host_reads"],
            peak_bytes=memory_stats()["MaxInUse"],
        )
    )
    _state.before_step = now


def reset(*, forget_recipes: bool = True) -> None:
    """Reset counters, steps and peak memory, and the recipe cache unless told otherwise."""
    extension().reset_counters(forget_recipes)
    extension().reset_peak_memory()
    _state.steps.clear()
    _state.graphs.clear()
    _state.before_step = counters()


def report() -> Report:
    """The counts so far."""
    total, memory = counters(), memory_stats()
    return Report(
        mode="lazy" if _state.lazy else "eager",
        recipes=total["recipes"],
        launches=total["launches"],
        ops=total["ops"],
        host_reads=total["host_reads"],
        flushes=total["flushes"],
        compiled_graphs=compiled_graphs(),
        peak_bytes=memory["MaxInUse"],
        in_use_bytes=memory["InUse"],
        limit_bytes=memory["Limit"],
        steps=tuple(_state.steps),
    )


def parse_bytes(text: int | str) -> int:
    """`"96GiB"` -> 103079215104. Units B, KiB, MiB, GiB, TiB (powers of 1024); a bare number is bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].upper() not in _UNITS:
        raise ConfigError(
            f"memory {text!r} is not an amount of memory; give bytes as a whole number, or a number with one of "
            "B, KiB, MiB, GiB, TiB, as in '96GiB'."
        )
    return int(float(match[1]) * _UNITS[match[2].upper()]) if match[2] else int(match[1])


def _lazy_from_environment() -> bool:
    return os.environ.get(MODE_VARIABLE, "1") != "0"


def _max_ops_from_environment() -> int:
    return int(os.environ.get(MAX_OPS_VARIABLE, UNLIMITED_OPS))


def _check_same_mode(lazy: bool) -> None:
    if lazy != _state.lazy:
        running, asked = ("lazy", "eager") if _state.lazy else ("eager", "lazy")
        raise DeviceError(
            f"The simulated HPU already runs in {running} mode in this process, but {asked} mode was asked for. The "
            "mode cannot change: use another process."
        )


def _refuse_real_software() -> None:
    if PACKAGE in sys.modules or importlib.util.find_spec(PACKAGE) is not None:
        raise DeviceError(
            f"{PACKAGE} is installed here, but the simulated HPU needs a stand-in of the same name. Run on the real "
            "device, or use an environment without it for the simulation."
        )


def _refuse_late_install() -> None:
    asked = [name for name, function in _availability_probes().items() if function.cache_info().currsize]
    if asked:
        raise DeviceError(
            f"The simulated HPU comes too late: {', '.join(asked)} has already answered that there is no HPU, and "
            "remembers it. Install it before transformers and accelerate are used, or start the script with: "
            "python -m dropbp.backends.hpu_simulator SCRIPT"
        )


def _hide_gpus() -> None:
    import torch

    os.environ[OTHER_ACCELERATORS_VARIABLE] = ""
    if torch.cuda.is_available():
        raise DeviceError(
            "The simulated HPU comes too late: this process has already found its GPUs, and PyTorch knows one "
            f"accelerator for a process. Install it first in the process, or set {OTHER_ACCELERATORS_VARIABLE}=''."
        )


def _availability_probes() -> dict[str, Any]:
    places = {
        "transformers.utils.import_utils": "is_torch_hpu_available",
        "accelerate.utils.imports": "is_hpu_available",
    }
    loaded = {f"{module}.{name}": getattr(sys.modules.get(module), name, None) for module, name in places.items()}
    return {name: function for name, function in loaded.items() if hasattr(function, "cache_info")}


def _check_hooks() -> None:
    import torch

    if torch.accelerator.current_accelerator() != torch.device("hpu"):
        raise DeviceError(
            "The simulated HPU comes too late: PyTorch has already looked for the accelerators of this process and "
            f"keeps its answer ({torch.accelerator.current_accelerator()}). Install it first thing in the process."
        )


def _expose_habana_frameworks() -> None:
    """Make the stand-in importable under its name, without adding a folder to `sys.path`."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, PACKAGE_DIR / "__init__.py", submodule_search_locations=[str(PACKAGE_DIR)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    importlib.import_module(f"{PACKAGE}.torch")


def _count_optimizer_steps() -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(mark_step_done)
