"""Rows of a data set, from a file or from the Hub, as plain dictionaries."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from dropbp.errors import ConfigError

Row: TypeAlias = dict[str, Any]
_LONGEST_CSV_FIELD = 2**31 - 1  # the most that the csv module takes on every platform


def read_rows(source: str) -> list[Row]:
    """All rows of a file (`.jsonl`, `.json`, `.csv`, `.txt`, `.parquet`) or of a Hub data set's `train` split.

    Raises ConfigError if nothing is there, the format is not known, a row is broken, or there are no rows.
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
            f"--dataset {path} ends in {path.suffix or 'no suffix'!r}; supported: {', '.join(sorted(_READERS))}."
        )
    try:
        return reader(path)
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset {path} is not text in UTF-8: {error}. Save it as UTF-8, unpacked.") from error
    except OSError as error:
        raise ConfigError(f"--dataset {path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> list[Row]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    places = {f"{path}, line {number}": line for number, line in enumerate(lines, 1) if line.strip()}
    return [_checked(_parsed(line, where, ""), where) for where, line in places.items()]


def _read_json(path: Path) -> list[Row]:
    hint = "; one object per line needs the suffix .jsonl"
    rows = _parsed(path.read_text(encoding="utf-8-sig"), str(path), hint)
    if not isinstance(rows, list):
        raise ConfigError(f"--dataset {path} holds a {type(rows).__name__}; expected a list of objects.")
    return [_checked(row, f"{path}, entry {number}") for number, row in enumerate(rows, 1)]


def _parsed(text: str, where: str, hint: str) -> Any:
    """The content of a JSON text. `hint` is added where the text is no JSON."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if hint else ""
        raise ConfigError(f"--dataset {where} is not JSON: {error.msg} at {line}column {error.colno}{hint}.") from error
    except RecursionError as error:
        raise ConfigError(
            f"--dataset {where} is nested too deeply to be read; remove that row or flatten it."
        ) from error
    except _RepeatedKeyError as error:
        raise ConfigError(f"--dataset {where} holds the key {str(error)!r} twice in one object; keep one.") from error
    except ValueError as error:  # Python refuses to convert integers of thousands of digits
        raise ConfigError(f"--dataset {where} holds a number of too many digits; put it into quotes.") from error


class _RepeatedKeyError(Exception):
    """An object has a key twice, and JSON does not say which value counts."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return row


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(f"--dataset {where} holds a {type(row).__name__}; expected an object with named columns.")
    return row


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file, _any_field_length():
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            return [_csv_row(path, header, fields, reader.line_num) for fields in reader if fields]
        except csv.Error as error:
            raise ConfigError(f"--dataset {path}, line {reader.line_num} is not CSV: {error}.") from error


def _csv_row(path: Path, header: Sequence[str], fields: Sequence[str], line: int) -> Row:
    if len(fields) != len(header) or len(set(header)) != len(header):
        raise ConfigError(
            f"--dataset {path}, line {line} has {len(fields)} fields for the {len(header)} columns "
            f"{', '.join(header)}; expected one field per column, and distinct column names."
        )
    return dict(zip(header, fields, strict=True))


@contextmanager
def _any_field_length() -> Iterator[None]:
    """Raise the csv module's limit, which is global, and restore it afterwards."""
    limit = csv.field_size_limit(_LONGEST_CSV_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


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
    except ValueError as error:  # values that Python has no type for, dates of the year 10000 for example
        raise ConfigError(f"--dataset {path} holds values that cannot be read: {error}") from error
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
        raise ConfigError(f"--dataset {source} is not a file; expected a file or a data set's id on the Hub.")
    from datasets import load_dataset

    try:
        return [dict(row) for row in load_dataset(source, split="train")]
    except Exception as error:  # the hub's client has dozens of error types, and all mean that there is no data
        raise ConfigError(f"--dataset {source} is not a local file, and the Hub did not deliver it: {error}") from error
