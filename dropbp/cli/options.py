"""Checks of options that several commands share, before any work is done."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from dropbp.errors import ConfigError

MOST = 2**24  # rows, tokens, steps: far above what is trained, far below what overflows
MOST_MICRO_BATCHES = 2**14  # a mask is drawn for each
MOST_SEED = 2**32 - 1  # numpy's, which every trainer seeds


def check_counts(args: argparse.Namespace, names: Iterable[str], most: int = MOST) -> None:
    """Raises ConfigError if an option is given and is not a whole number from 1 to `most`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{_option(name)} {value} must be {'1 or more' if value < 1 else f'{most:,} at most'}.")


def check_amounts(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ConfigError if an option is given and is not a finite number above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value <= sys.float_info.max:
            raise ConfigError(f"{_option(name)} {value} must be above 0, and finite.")


def check_shares(args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raises ConfigError if an option is not a number in [0, 1)."""
    for name in names:
        if not 0 <= getattr(args, name) < 1:
            raise ConfigError(f"{_option(name)} {getattr(args, name)} must be in [0, 1).")


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed that some generator does not accept."""
    if not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"--seed {seed} must be from 0 to {MOST_SEED}.")


def check_file(option: str, path: Path | None, suffix: str = "") -> None:
    """Raises ConfigError if the file cannot be written, or its name has another suffix."""
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise ConfigError(f"{option} {path} must end in {suffix}.")
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder; name a file in it.")
    _check_place(option, path, path.parent)


def check_folder(option: str, path: Path) -> None:
    """Raises ConfigError if the folder does not exist and cannot be made, or is not writable."""
    _check_place(option, path, path)


def _check_place(option: str, path: Path, folder: Path) -> None:
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ConfigError(f"{option} {path} cannot be written: {there} is not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path} cannot be written: no permission in {there}.")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
