"""The command `dropbp`: runs a subcommand, and turns expected errors into one line."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from dropbp import __version__
from dropbp.cli.commands import Command, add_commands
from dropbp.cli.libraries import leave_out_unused
from dropbp.errors import DropBPError, ResourceError, as_missing_dependency, as_resource_error

EXIT_EXHAUSTED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
COMMANDS = {
    "finetune": Command(
        "dropbp.cli.finetune", "fine-tune a causal language model with DropBP; without data, run the demo"
    ),
    "inspect": Command("dropbp.cli.inspection", "list a model's residual branches, with FLOPs and parameters"),
    "plan": Command("dropbp.cli.plan", "predict time, memory and FLOPs of a step per drop rate"),
    "bench": Command("dropbp.bench.parts", "measure speed, memory and learning; one JSON file per run"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dropbp` with these arguments; None takes those of the process, which then is the command's own.

    Return the exit status: 0; after one line on standard error 1 when memory or disk space ran out, 2 after bad input,
    130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        leave_out_unused(arguments)
    try:
        with _interrupts_repeated():
            return _dispatch(arguments)
    except DropBPError as error:
        return _fail(str(error), EXIT_EXHAUSTED if isinstance(error, ResourceError) else EXIT_BAD_INPUT)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        message, status = _explained(error)
        if message is None:
            raise
        return _fail(message, status)


def build_parser() -> argparse.ArgumentParser:
    """The parser, with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="dropbp", description="Cheaper fine-tuning: skip the backward of random residual branches."
    )
    parser.add_argument("--version", action="version", version=f"dropbp {__version__}")
    parser.add_argument("--json", action="store_true", help="with no command: versions and commands as JSON")
    add_commands(parser, "command", COMMANDS)
    return parser


def _dispatch(arguments: list[str]) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.command is not None:
        return int(COMMANDS[args.command].load().run(args))
    about = {"version": __version__, "commands": {name: command.help for name, command in COMMANDS.items()}}
    print(json.dumps(about, indent=2) if args.json else parser.format_help().rstrip())
    return 0


@contextlib.contextmanager
def _interrupts_repeated() -> Iterator[None]:
    """Repeat a Ctrl-C that comes in a destructor or in the callback of a weak reference, where Python drops it."""
    hook = sys.unraisablehook

    def repeat(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            hook(unraisable)
            return
        again = threading.Timer(0.01, _thread.interrupt_main)
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # at the end of the process no thread starts any more
            again.start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _explained(error: Exception) -> tuple[str | None, int]:
    """The message for an error of another library, and the exit status. None: the error is a bug in this program."""
    exhausted = as_resource_error(error)
    if exhausted is not None:
        return str(exhausted), EXIT_EXHAUSTED
    missing = as_missing_dependency(error)
    if missing is not None:
        return str(missing), EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror}.", EXIT_BAD_INPUT
    return None, EXIT_BAD_INPUT


def _fail(message: str, status: int) -> int:
    print(f"dropbp: {' '.join(message.split())}", file=sys.stderr)
    return status
