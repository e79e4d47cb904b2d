"""Starting several processes with the real launcher, and reading what they wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
    launcher: Sequence[str] = ("torch.distributed.run", f"--nproc-per-node={PROCESSES}"),
    processes: int = PROCESSES,
    steps: int | None = None,
) -> list[dict[str, Any]]:
    """Results of the cases of a module, one dict for each rank. A hang is an error.

    Args:
        module: of `tests.distributed`, or with its full name; it has `CASES`, `start` and `stop`.
        cases: names of some of its cases; none means all.
        options: of the launcher.
        limit_s: seconds after which the processes are taken to wait for each other.
        launcher: module that starts the processes, and its own options; see `LAUNCHERS`.
        processes: how many it starts.
        steps: of each training run; none means `training.STEPS`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [*_started_by(launcher), *options, "-m", "tests.distributed.worker", str(folder), module, *cases]
        with (folder / "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=_environment(steps), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            _wait(process, log, limit_s)
        return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def accelerated_by(*options: str, processes: int = PROCESSES) -> dict[str, Any]:
    """What `launch` needs to start the processes by `accelerate launch`.

    On a CPU, `--cpu` starts one process, whatever their number; `--multi_gpu` starts as many as are asked for.
    """
    plain = (f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
    return {"launcher": ("accelerate.commands.launch", *options, *plain), "processes": processes}


# How processes can be started, by the name that tests ask for.
LAUNCHERS: dict[str, dict[str, Any]] = {
    "torchrun": {},
    "accelerate, one process": accelerated_by("--cpu", processes=1),
    "accelerate": accelerated_by("--multi_gpu"),
    "accelerate, ZeRO-3": accelerated_by(
        "--use_deepspeed", "--zero_stage=3", "--zero3_init_flag=false", "--gradient_clipping=1e6"
    ),
}


def _started_by(launcher: Sequence[str]) -> list[str]:
    name, *options = launcher
    port = "--main_process_port" if name.startswith("accelerate") else "--master-port"
    return [sys.executable, "-m", name, *options, f"{port}={_free_port()}"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(steps: int | None) -> dict[str, str]:
    return {
        **os.environ,
        **({} if steps is None else {"DROPBP_TEST_STEPS": str(steps)}),
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
