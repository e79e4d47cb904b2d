"""`python -m dropbp.backends.hpu_simulator [options] train.py ...`: a script on the simulated HPU, with a report."""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

from ._report import Report
from ._session import DEFAULT_MEMORY, install, report


def main(argv: list[str] | None = None) -> int:
    """Run the script and return its exit status."""
    options = _parser().parse_args(argv)
    install(lazy=options.lazy, memory=options.memory)
    try:
        status = _run(options.script, options.arguments)
    finally:
        _publish(report(), options.json)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dropbp.backends.hpu_simulator", description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--lazy", dest="lazy", action="store_true", default=None, help="lazy mode (the default)")
    mode.add_argument("--eager", dest="lazy", action="store_false", help="eager mode, with torch.compile")
    parser.add_argument("--memory", default=DEFAULT_MEMORY, help="device memory, e.g. 96GiB (default) or 512MiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report, step by step, to FILE")
    parser.add_argument("script", help="the Python script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _run(script: str, arguments: list[str]) -> int:
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _publish(result: Report, path: Path | None) -> None:
    print(f"\n{result}", file=sys.stderr)
    if path is not None:
        path.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
