"""One JSON file per run: configuration, versions, device, every raw step time, and how the run ended.

A run is known by its kind and configuration. A finished one is a file of that name, written whole or not at all, and is
not run again. Until then its file lies in the folder `unfinished`, and is written anew with each figure (`save`), so
that a run that was stopped, in whatever way, goes on where it was. One that failed stays there, and is begun anew.
"""

from __future__ import annotations

import json
import platform
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dropbp.device import Device
from dropbp.errors import ConfigError
from dropbp.files import write_text

SCHEMA = 1
RESULTS = Path(__file__).parents[1] / "results"
UNFINISHED = "unfinished"
FILES = "[!.]*.json"  # what is being written has a dot in front
ROUNDS = "rounds"
STOPPED = ("running", "cancelled")  # "running" is what a killed process leaves behind
_PACKAGES = ("dropbp", "torch", "transformers", "peft", "bitsandbytes")
Record = dict[str, Any]


class Store:
    """The files of one kind of runs, below `root`."""

    def __init__(self, root: Path, kind: str) -> None:
        self.folder, self.kind = root / kind, kind

    def path(self, name: str) -> Path:
        """Where the finished run of that name is."""
        return self.folder / f"{_file_name(name)}.json"

    def finished(self, name: str, configuration: Mapping[str, Any]) -> Record | None:
        """The finished run of that name and configuration; None if there is none, or it was another one.

        One of more rounds than the configuration asks for will do.
        """
        path = self.path(name)
        record = read(path) if path.is_file() else None
        if record is None:
            return None
        asked, done = _plain(configuration), dict(record["configuration"])
        if ROUNDS in asked and ROUNDS in done:
            done[ROUNDS] = min(asked[ROUNDS], done[ROUNDS])
        return record if done == asked else None

    @contextmanager
    def run(
        self, name: str, configuration: Mapping[str, Any], device: Device, *, goes_on: bool = False
    ) -> Iterator[Record]:
        """A record to fill; it is written when the block ends, whatever its end, and errors go on.

        `failures`, a list in the record, is for parts that failed without ending the run.

        Args:
            name: of the run.
            configuration: what makes it what it is.
            device: where it runs.
            goes_on: take up the record of a run of the same name, configuration, device and versions that was stopped,
                if there is one. What it holds is measured; `continued` lists when it was taken up.
        """
        record = new_record(self.kind, name, configuration, device)
        stopped = self._stopped(record) if goes_on else None
        if stopped is not None:
            record = {**stopped, "status": "running", "continued": [*stopped.get("continued", []), now()]}
        path = self._unfinished_path(record)
        try:
            yield record
            record["status"] = "finished"
        except KeyboardInterrupt:
            record["status"] = "cancelled"
            raise
        except BaseException as error:
            record["status"] = "failed"
            record["failures"].append(describe_error(error))
            raise
        finally:
            record["ended"] = now()
            write(record, self.path(name) if record["status"] == "finished" else path)
            if record["status"] == "finished":
                path.unlink(missing_ok=True)

    def measured(
        self,
        name: str,
        configuration: Mapping[str, Any],
        device: Device,
        measure: Callable[[], Mapping[str, Any]],
        *,
        again: bool = False,
    ) -> Record:
        """The finished run of that name and configuration; else, or `again`, one that holds what `measure` returns."""
        found = None if again else self.finished(name, configuration)
        if found is None:
            with self.run(name, configuration, device) as found:
                found.update(measure())
        return found

    def save(self, record: Record) -> None:
        """Write what a run that goes on has measured, so that it is not lost if the process is ended."""
        write(record, self._unfinished_path(record))

    def _unfinished_path(self, record: Record) -> Path:
        started = re.sub(r"\W", "", record["started"])
        return self.folder / UNFINISHED / f"{_file_name(record['name'])}--{started}.json"

    def _stopped(self, new: Record) -> Record | None:
        """The latest stopped run that is the same as a new one, unless one was finished after it."""
        path = self.path(new["name"])
        finished = read(path) if path.is_file() else None
        for record in reversed(read_unfinished(self.folder.parent, self.kind)):
            same = all(record[key] == new[key] for key in ("name", "configuration", "versions"))
            later = finished is None or record["started"] > finished["started"]
            if same and later and record["status"] in STOPPED and _machine(record) == _machine(new):
                return record
        return None


def _machine(record: Record) -> list[Any]:
    """What a device is, without what a process decides about it."""
    return [record["device"].get(key) for key in ("name", "generation", "memory_limit_bytes")]


def new_record(kind: str, name: str, configuration: Mapping[str, Any], device: Device) -> Record:
    """A record of a run that begins now."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "name": name,
        "status": "running",
        "started": now(),
        "configuration": _plain(configuration),
        "versions": versions(),
        "device": _plain(device.describe()),
        "failures": [],
    }


def read(path: Path) -> Record:
    """One record.

    Raises:
        ConfigError: the file is damaged, or of another schema.
    """
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
        schema = record["schema"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a result file ({error!r}). Delete it, and its run is done again.") from error
    if schema != SCHEMA:
        raise ConfigError(f"{path} has schema {schema!r}; this version reads {SCHEMA}. Delete it to run it again.")
    return record


def read_all(root: Path, kind: str) -> list[Record]:
    """All finished runs of a kind, in the order of their names."""
    return read_folder(root / kind)


def read_unfinished(root: Path, kind: str) -> list[Record]:
    """All runs of a kind that failed or were cancelled, oldest first."""
    return read_folder(root / kind / UNFINISHED)


def read_folder(folder: Path) -> list[Record]:
    """All records of a folder, in the order of their names."""
    return [read(path) for path in sorted(folder.glob(FILES))]


def write(record: Record, path: Path, *, compact: bool = False) -> None:
    """Write a record, whole or not at all; a compact one is a single line."""
    text = json.dumps(record, separators=(",", ":")) if compact else json.dumps(record, indent=1)
    write_text(path, f"{text}\n")


def versions() -> dict[str, str | None]:
    """Versions of what a figure depends on; None where it is not installed.

    That of torch is its own: a wheel's metadata need not say which build it is (2.13.0 for 2.13.0+cu130).
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = None
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": str(torch.__version__)}


def describe_error(error: BaseException) -> dict[str, str]:
    """An error as data; of the trace only the innermost function, so that no path of the machine is kept."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "where": f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "",
    }


def now() -> str:
    """The time, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """What JSON makes of it, so that a configuration can be compared with one read from a file."""
    return json.loads(json.dumps(value))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)
