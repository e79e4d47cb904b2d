"""Commands as data: each is a module with `add_arguments(parser)` and `run(args) -> int`.

Only the module of the command that was asked for is imported, so that `dropbp --help` stays quick.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """The module of a command, and its description in `--help`."""

    module: str
    help: str

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(self.module)


class CommandParser(argparse.ArgumentParser):
    """The parser of one command. It declares the options when it first parses."""

    command: Command | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        command, self.command = self.command, None
        if command is not None:
            command.load().add_arguments(self)
        return super().parse_known_args(args, namespace)


def add_commands(
    parser: argparse.ArgumentParser, dest: str, commands: Mapping[str, Command], *, required: bool = False
) -> None:
    """Let the parser choose between the commands; the name of the chosen one goes to `dest`."""
    choice = parser.add_subparsers(dest=dest, metavar=dest.upper(), required=required, parser_class=CommandParser)
    for name, command in commands.items():
        choice.add_parser(name, help=command.help, description=command.help).command = command
