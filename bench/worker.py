"""`python -m dropbp.bench.worker`: a process that runs parts of the bench on request, one after another.

A request is the arguments of `dropbp bench`. The answer is the exit status, the error in one sentence, and the bytes
still allocated on the device, which tell the parent whether the next part would start clean.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from dropbp.cli.main import EXIT_BAD_INPUT
from dropbp.errors import DropBPError

from .common.processes import answer, requests
from .parts import main


def serve() -> None:
    """Serve until the parent is gone. Standard output is reserved for answers; parts print to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for request in requests():
        answer({**_run(request), "held_bytes": _held_bytes()}, answers)


def _run(arguments: Sequence[str]) -> dict[str, Any]:
    try:
        return {"status": main(arguments), "error": None}
    except DropBPError as error:
        return {"status": EXIT_BAD_INPUT, "error": str(error)}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the parent reports it and starts the next part
        traceback.print_exc()
        return {"status": 1, "error": f"{type(error).__name__}: {error}"}


def _held_bytes() -> int:
    gc.collect()
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


if __name__ == "__main__":
    serve()
