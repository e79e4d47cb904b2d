"""`python -m tests.campaigns.reliability [CHECK…] [--write-docs]`: what takes long; see docs/reliability.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it only once

import torch

from dropbp.files import write_text
from tests.campaigns.reliability.page import PAGE, RESULTS, page
from tests.campaigns.reliability.registry import CHECKS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.reliability", description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)}; none means all")
    parser.add_argument("--times", type=int, metavar="N", help="how many instead of the full number")
    parser.add_argument("--write-docs", action="store_true", help="record the figures and write the page")
    args = parser.parse_args()
    unknown = set(args.checks) - set(CHECKS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(CHECKS)}")
    torch.set_num_threads(1)
    for name in args.checks or CHECKS:
        figures = _run(name, args.times or CHECKS[name].many)
        if args.write_docs:
            _record({name: figures})
    return 0


def _run(name: str, times: int) -> dict[str, Any]:
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = CHECKS[name].run(times, Path(folder))
    figures["times"] = times
    figures["minutes"] = round((time.monotonic() - begin_s) / 60, 1)
    print(f"{name}: {json.dumps(figures)}", file=sys.stderr, flush=True)
    return figures


def _record(found: dict[str, Any]) -> None:
    """Write after each check, so an aborted run keeps its results; figures of other checks are kept."""
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["checks"] if RESULTS.is_file() else {}
    checks = {name: {**old, **found}[name] for name in CHECKS if name in {**old, **found}}
    record = {"schema": 1, "torch": str(torch.__version__), "checks": checks}
    write_text(RESULTS, json.dumps(record, indent=1) + "\n")
    write_text(PAGE, page(record))


if __name__ == "__main__":
    sys.exit(main())
