"""Starting several processes with the real launcher, and reading what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = 2
LIMIT_S = 200


def launch(
    module: str,
    cases: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
    limit_s: float = LIMIT_S,
) -> list[dict[str, Any]]:
    """Results of the cases of a module, one dict for each rank. A hang is an error.

    Args:
        module: of `tests.distributed`, or with its full name; it has `CASES`, `start` and `stop`.
        cases: names of some of its cases; none means all.
        options: of torchrun.
        limit_s: seconds after which the processes are taken to wait for each other.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*_torchrun(), *options, "-m", "tests.distributed.worker", str(folder), module, *cases]
        with (folder / "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            _wait(process, log, limit_s)
        return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(PROCESSES)]


def _torchrun() -> list[str]:
    name = "torch.distributed.run"
    return [sys.executable, "-m", name, f"--nproc-per-node={PROCESSES}", f"--master-port={_free_port()}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "DS_ACCELERATOR": "cpu",
    }


def _wait(process: subprocess.Popen[bytes], log: Any, limit_s: float) -> None:
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        _end(process)
        code = f"none after {limit_s} s: the processes wait for each other"
    if code:
        log.seek(0)
        raise AssertionError(f"exit status {code}\n{log.read()[-6000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The launcher and what it started: they are a session of their own."""
    os.killpg(process.pid, 9)
    process.wait()
