"""Run in each of two processes: the cells of DDP and FSDP2."""

from __future__ import annotations

import functools

from tests.campaigns.compatibility.cells import names, try_cell
from tests.distributed.ddp import start, stop

CASES = {" | ".join(cell): functools.partial(try_cell, *cell) for engine in ("DDP", "FSDP2") for cell in names(engine)}
__all__ = ["CASES", "start", "stop"]
