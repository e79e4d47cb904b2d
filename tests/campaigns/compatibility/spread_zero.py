"""Run in each of two processes: the cells of ZeRO-3."""

from __future__ import annotations

import functools
import os

from accelerate.state import PartialState

from tests.campaigns.compatibility.cells import names, try_cell
from tests.distributed import zero
from tests.distributed.zero import stop


def start() -> int:
    """On CPU, accelerate must be told the backend, or each process takes itself for the only one."""
    rank = zero.start()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return rank


CASES = {" | ".join(cell): functools.partial(try_cell, *cell) for cell in names("ZeRO-3")}
__all__ = ["CASES", "start", "stop"]
