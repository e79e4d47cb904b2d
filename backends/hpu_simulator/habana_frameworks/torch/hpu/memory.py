"""Memory in bytes, by the names that Gaudi uses. As there, whichever device is named they are this process's."""

from dropbp.backends.hpu_simulator._session import extension
from habana_frameworks.torch.hpu._utils import device_index


def memory_stats(device=None):
    device_index(device)
    return dict(extension().memory_stats())


def memory_allocated(device=None):
    return memory_stats(device)["InUse"]


def max_memory_allocated(device=None):
    return memory_stats(device)["MaxInUse"]


def memory_reserved(device=None):
    """All of it: Gaudi's process takes the whole device."""
    return memory_stats(device)["Limit"]


def max_memory_reserved(device=None):
    return memory_stats(device)["Limit"]


def mem_get_info(device=None):
    stats = memory_stats(device)
    return stats["Limit"] - stats["InUse"], stats["Limit"]


def reset_peak_memory_stats(device=None):
    device_index(device)
    extension().reset_peak_memory()


def reset_accumulated_memory_stats(device=None):
    device_index(device)
    extension().reset_allocation_counts()


def empty_cache():
    """Nothing is cached."""


def memory_summary(device=None, abbreviated=False):
    return "\n".join(f"{name}: {value}" for name, value in memory_stats(device).items())
