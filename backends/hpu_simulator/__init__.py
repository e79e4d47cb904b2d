"""A simulated HPU: host memory behind PyTorch's own `hpu` device type, with a lazy-graph recorder.

    from dropbp.backends import hpu_simulator
    hpu_simulator.install(lazy=True, memory="96GiB")     # before transformers, before the first backward pass
    ...                                                  # any training code that runs on Gaudi
    print(hpu_simulator.report())

or, for a script that knows nothing of it, `python -m dropbp.backends.hpu_simulator train.py`. What it shows and what it
does not is in `docs/hpu_simulator.md`. It is an explicit tool: nothing in dropbp loads it by itself, and once loaded it
stays for the life of the process.
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
