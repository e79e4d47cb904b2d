"""A simulated HPU: host memory behind PyTorch's own `hpu` device type, with a lazy-graph recorder.

    from dropbp.backends import hpu_simulator
    hpu_simulator.install(lazy=True, memory="96GiB")     # before transformers, before the first backward pass
    ...                                                  # any training code that runs on Gaudi
    print(hpu_simulator.report())

For an unchanged script: `python -m dropbp.backends.hpu_simulator train.py`. `docs/hpu_simulator.md` says what it
simulates. dropbp never loads it by itself. Once loaded, it stays in the process.
"""

from __future__ import annotations

from ._report import Report, StepCount
from ._session import (
    compiled_graphs,
    counters,
    install,
    is_installed,
    mark_step_done,
    memory_stats,
    parse_bytes,
    recipes,
    report,
    reset,
    set_memory_limit,
)

__all__ = [
    "Report",
    "StepCount",
    "compiled_graphs",
    "counters",
    "install",
    "is_installed",
    "mark_step_done",
    "memory_stats",
    "parse_bytes",
    "recipes",
    "report",
    "reset",
    "set_memory_limit",
]
