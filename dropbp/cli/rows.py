"""Rows of a data set, from a file or from the Hub, as plain dictionaries."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from dropbp.errors import ConfigError

Row: TypeAlias = dict[str, Any]


def read_rows(source: str) -> list[Row]:
    """All rows of a file (`.jsonl`, `.json`, `.csv`, `.txt`, `.parquet`) or of a Hub data set's `train` split.

    Raises:
        ConfigError: nothing is there, the format is not known, a row is broken, or there are no rows.
    """
    path = Path(source)
    rows = _read_file(path) if path.is_file() else _read_hub(source)
    if not rows:
        raise ConfigError(f"--dataset {source} holds no rows.")
    return rows


def _read_file(path: Path) -> list[Row]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(
            f"--dataset {path} ends in {path.suffix or 'no suffix'!r}; known are {', '.join(sorted(_READERS))}."
        )
    try:
        return reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset {path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [_json_row(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _json_row(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--dataset {path}, line {number} is not JSON: {error.msg} at column {error.colno}."
        ) from error
    return _checked(row, f"{path}, line {number}")


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--dataset {path} is not JSON: {error}; one object per line needs the suffix .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise ConfigError(f"--dataset {path} holds a {type(rows).__name__}; needed is a list of objects.")
    return [_checked(row, f"{path}, entry {number}") for number, row in enumerate(rows, 1)]


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(f"--dataset {where} holds a {type(row).__name__}; needed is an object with named columns.")
    return row


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_text(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    return [{"text": text}] if text.strip() else []


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"--dataset {path} is not a Parquet file: {error}") from error
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def _read_hub(source: str) -> list[Row]:
    if Path(source).exists() or Path(source).suffix.lower() in _READERS or source.count("/") > 1:
        raise ConfigError(f"--dataset {source} is not a file; needed is a file or a data set's id on the Hub.")
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(source, split="train")]
    except Exception as error:  # the hub's client has dozens of error types, and all mean that there is no data
        raise ConfigError(f"--dataset {source} is no file here, and the Hub did not give it: {error}") from error
