"""`torch.hpu`: the device module that PyTorch, accelerate and transformers ask."""

import os

import torch
from dropbp.backends.hpu_simulator._session import DEVICE_COUNT, extension
from habana_frameworks.torch.hpu import graphs, memory, metrics, random, streams
from habana_frameworks.torch.hpu._utils import device_index
from habana_frameworks.torch.hpu.graphs import ModuleCacher, make_graphed_callables, wrap_in_hpu_graph
from habana_frameworks.torch.hpu.memory import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    memory_summary,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
)
from habana_frameworks.torch.hpu.random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from habana_frameworks.torch.hpu.streams import Event, Stream, current_stream, default_stream, set_stream, stream

# True from the start: without it checkpointing does not restore the device's random state.
_initialized = True
_settings = {"dynamic_shape": True}


def init():
    """Nothing to do: the device is there once the simulator is."""


def _lazy_init():
    init()


def is_initialized():
    return _initialized


def _is_in_bad_fork():
    return False


def is_available():
    return True


def is_bf16_supported(including_emulation=True):
    return True


def device_count():
    """The cards of the machine, not those that this process may use, of which there is one."""
    return DEVICE_COUNT


def current_device():
    """Always 0: a process has one card, whichever it is."""
    return 0


def set_device(device):
    """Choose the card of this process, as on Gaudi by a variable. Its tensors are on `hpu:0` all the same."""
    os.environ["HLS_MODULE_ID"] = str(device_index(device))


def get_device_name(device=None):
    device_index(device)
    return "GAUDI2"


def get_device_capability(device=None):
    device_index(device)
    return "1.24.0"


def get_device_properties(device=None):
    device_index(device)
    return f"(sramBaseAddress=0, dramSize={memory_stats()['Limit']}, name=GAUDI2, simulated)"


def synchronize():
    """Launch what is recorded; nothing runs asynchronously here. As on Gaudi it takes no device."""
    extension().flush("synchronize")


class device:
    """Context manager that selects a device: that of this process, and no other."""

    def __init__(self, device):
        self.idx, chosen = device_index(device), int(os.environ.get("HLS_MODULE_ID", "-1"))
        if self.idx not in (0, chosen):
            raise AssertionError(f"Requested device_id={self.idx} is different from env_device_id={chosen}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


class device_of(device):
    def __init__(self, obj):
        super().__init__(obj.device if isinstance(obj, torch.Tensor) and obj.device.type == "hpu" else None)


def set_autocast_hpu_enabled(enabled):
    torch.set_autocast_enabled("hpu", enabled)


def is_autocast_hpu_enabled():
    return torch.is_autocast_enabled("hpu")


def set_autocast_hpu_dtype(dtype):
    torch.set_autocast_dtype("hpu", dtype)


def get_autocast_hpu_dtype():
    return torch.get_autocast_dtype("hpu")


def enable_dynamic_shape():
    _settings["dynamic_shape"] = True


def disable_dynamic_shape():
    _settings["dynamic_shape"] = False


def get_dynamic_shape_status():
    return _settings["dynamic_shape"]


def utilization(device=None):
    return 0


def _register():
    import sys

    torch._register_device_module("hpu", sys.modules[__name__])
    sys.modules["torch.hpu"] = sys.modules[__name__]
    # As on Gaudi: a checkpointed function without tensors on any device is taken to run on this one.
    torch.utils.checkpoint.DefaultDeviceType.set_device_type("hpu")


import torch.utils.checkpoint  # noqa: E402

_register()
