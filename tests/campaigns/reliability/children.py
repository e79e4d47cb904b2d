"""Commands as processes that can be killed, interrupted and limited. Imports are done once, before the fork."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PRELOADED = ["tests.campaigns.reliability.preloaded"]
LIMIT_S = 240
BEGINS = "the command begins"
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOADED)


class Child:
    """A function in a process and session of its own, with standard error in a file."""

    def __init__(self, target: Callable[..., int | None], arguments: tuple[Any, ...], log: Path) -> None:
        self.log = log
        log.write_text("", encoding="utf-8")
        self._process = _SERVER.Process(target=_run, args=(target, arguments, log), daemon=True)
        self._process.start()

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return not self._process.is_alive()

    @property
    def said(self) -> str:
        """The process's standard error so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process only."""
        if self._process.pid is not None and not self.ended:
            os.kill(self._process.pid, number)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Wait and return the exit status, negative for a signal. Raises if the process does not end in time."""
        self._process.join(limit_s)
        status = self._process.exitcode
        assert status is not None, f"still running after {limit_s:g} s\n{self.said[-3000:]}"
        return status

    def wait_until(self, condition: Callable[[], Any]) -> None:
        """Return once the condition holds or the process has ended."""
        end_s = time.monotonic() + LIMIT_S
        while not condition() and not self.ended:
            assert time.monotonic() < end_s, f"nothing happened in {LIMIT_S:g} s\n{self.said[-3000:]}"
            time.sleep(0.005)

    def close(self) -> None:
        """End the process if it still runs."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def command(arguments: list[str], folder: Path, file_limit: int | None = None) -> Iterator[Child]:
    """A `dropbp` command in that folder. No file can exceed the limit in bytes, as on a full disk."""
    child = Child(_command, (arguments, folder, file_limit), folder / "log")
    try:
        yield child
    finally:
        child.close()


def _run(target: Callable[..., int | None], arguments: tuple[Any, ...], log: Path) -> None:
    os.setsid()
    with log.open("a", encoding="utf-8") as file, Path(os.devnull).open("w", encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    sys.exit(target(*arguments))


def _command(arguments: list[str], folder: Path, file_limit: int | None) -> int:
    import resource

    from dropbp.cli.main import main

    os.chdir(folder)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    print(BEGINS, file=sys.stderr)
    return main(arguments)
