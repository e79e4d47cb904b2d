"""Processes that the bench starts. None is left behind, whatever happens to the process that started it.

A process started here holds the other end of a pipe to its parent and ends when that closes, even if the parent is
killed. It imports from the same places as its parent, so a folder `dropbp/` in the working directory, as in a checkout,
does not replace the installed package.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

POLL_S = 0.1
GRACE_S = 10.0
EXIT_ORPHANED = 3
_RUN = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
Answer = dict[str, Any]


def module_command(module: str) -> list[str]:
    """The command that runs a module like `python -m`, with this process's import path."""
    return [sys.executable, "-c", _RUN, json.dumps(sys.path), module]


def requests() -> Iterator[Any]:
    """The parent's requests from standard input, one JSON line each. This process ends when standard input closes."""
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(received,), daemon=True).start()
    while True:
        yield received.get()


def _receive(received: queue.SimpleQueue[Any]) -> None:
    """Read the file descriptor and not `sys.stdin`, whose lock this thread would hold while the interpreter
    shuts down.
    """
    pending = b""
    while read := os.read(0, 1 << 16):
        *lines, pending = (pending + read).split(b"\n")
        for line in lines:
            received.put(json.loads(line))
    os._exit(EXIT_ORPHANED)


class Worker:
    """A module in a process of its own that answers each request with one or more JSON lines."""

    def __init__(
        self, module: str, environment: Mapping[str, str] | None = None, errors: IO[str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            module_command(module),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, **(environment or {})}, text=True,
        )  # fmt: skip
        self._has_closed = False
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                self._answers.put(json.loads(line))
        self._has_closed = True
        self._answers.put(None)

    def ask(self, request: Any) -> None:
        """Send a request. If the process is dead, `answers` reports its end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def answers(self, until_s: float, stopped: Callable[[], bool] = lambda: False) -> Iterator[Answer | None]:
        """Each answer as it arrives; finally None, once the process has ended.

        Raises:
            TimeoutError: `time.monotonic()` has passed `until_s`.
            KeyboardInterrupt: `stopped()` is true.
        """
        while True:
            if stopped():
                raise KeyboardInterrupt
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            try:
                answer = self._answers.get(timeout=min(POLL_S, left_s))
            except queue.Empty:
                continue
            yield answer
            if answer is None:
                return

    def end(self) -> int:
        """End the process, unless it is about to end by itself, and return its exit status."""
        if not self._has_closed:
            self._process.terminate()
        try:
            status = self._process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._reader.join(GRACE_S)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        return status

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


class Stop:
    """Whether this process was told to end, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Note SIGINT and SIGTERM for later checks, instead of raising wherever the program happens to be.

    An exception from a signal handler is lost if it strikes a destructor. If it strikes just after a process was
    started, that process is left without an owner.
    """
    stop = Stop()

    def note(number: int, frame: object) -> None:
        stop.signal = number

    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer(values: Mapping[str, Any], stream: IO[str]) -> None:
    """Send an answer to the parent."""
    stream.write(json.dumps(values) + "\n")
    stream.flush()
