"""What each of two processes runs: the cells of ZeRO-3."""

from __future__ import annotations

import functools

from tests.compatibility.cells import names, try_cell
from tests.distributed.zero import start, stop

CASES = {" | ".join(cell): functools.partial(try_cell, *cell) for cell in names("ZeRO-3")}
__all__ = ["CASES", "start", "stop"]
