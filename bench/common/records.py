"""One JSON file per run: configuration, versions, device, every raw step time, and how the run ended.

A run is identified by its kind and configuration. A finished run is a file of that name, written atomically, and is not
repeated. Until then its file is in the folder `unfinished` and is rewritten with each figure (`save`), so a run that
was stopped in any way can be resumed. A failed run stays there, and is restarted from scratch.
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
FILES = "[!.]*.json"  # files being written start with a dot
ROUNDS = "rounds"
STOPPED = ("running", "cancelled")  # a killed process leaves "running" behind
_PACKAGES = ("dropbp", "torch", "transformers", "peft", "bitsandbytes")
Record = dict[str, Any]


class Store:
    """The files of one kind of runs, below `root`."""

    def __init__(self, root: Path, kind: str) -> None:
        self.folder, self.kind = root / kind, kind

    def path(self, name: str) -> Path:
        """Path of the finished run of that name."""
        return self.folder / f"{_file_name(name)}.json"

    def finished(self, name: str, configuration: Mapping[str, Any]) -> Record | None:
        """The finished run of that name and configuration; None if there is none, or its configuration differs.

        A run with more rounds than in the configuration is accepted.
        """
        path = self.path(name)
        record = read(path) if path.is_file() else None
        if record is None:
            return None
        wanted, done = _plain(configuration), dict(record["configuration"])
        if ROUNDS in wanted and ROUNDS in done:
            done[ROUNDS] = min(wanted[ROUNDS], done[ROUNDS])
        return record if done == wanted else None

    @contextmanager
    def run(
        self, name: str, configuration: Mapping[str, Any], device: Device, *, goes_on: bool = False
    ) -> Iterator[Record]:
        """A record to fill in. It is written when the block ends, also by an error, which is re-raised.

        `failures`, a list in the record, is for parts that failed without ending the run.

        Args:
            name: name of the run.
            configuration: the settings that identify it.
            device: where it runs.
            goes_on: resume a stopped run with the same name, configuration, device and versions, if there is one. Its
                measurements are kept, and `continued` lists the times at which it was resumed.
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
        """The finished run of that name and configuration. If there is none, or with `again`, measure and record it."""
        found = None if again else self.finished(name, configuration)
        if found is None:
            with self.run(name, configuration, device) as found:
                found.update(measure())
        return found

    def save(self, record: Record) -> None:
        """Write the measurements so far of a resumable run, so they survive if the process is ended."""
        write(record, self._unfinished_path(record))

    def _unfinished_path(self, record: Record) -> Path:
        started = re.sub(r"\W", "", record["started"])
        return self.folder / UNFINISHED / f"{_file_name(record['name'])}--{started}.json"

    def _stopped(self, new: Record) -> Record | None:
        """The latest stopped run that matches a new one, unless a run was finished after it."""
        path = self.path(new["name"])
        finished = read(path) if path.is_file() else None
        for record in reversed(read_unfinished(self.folder.parent, self.kind)):
            same = all(record[key] == new[key] for key in ("name", "configuration", "versions"))
            later = finished is None or record["started"] > finished["started"]
            if same and later and record["status"] in STOPPED and _machine(record) == _machine(new):
                return record
        return None


def _machine(record: Record) -> list[Any]:
    """The identity of a device, without settings of the process."""
    return [record["device"].get(key) for key in ("name", "generation", "memory_limit_bytes")]


def new_record(kind: str, name: str, configuration: Mapping[str, Any], device: Device) -> Record:
    """A record of a run that starts now."""
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
    """Read one record.

    Raises:
        ConfigError: the file is damaged, or has another schema.
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
    """All finished runs of a kind, sorted by name."""
    return read_folder(root / kind)


def read_unfinished(root: Path, kind: str) -> list[Record]:
    """All runs of a kind that failed or were cancelled, oldest first."""
    return read_folder(root / kind / UNFINISHED)


def read_folder(folder: Path) -> list[Record]:
    """All records of a folder, sorted by name."""
    return [read(path) for path in sorted(folder.glob(FILES))]


def write(record: Record, path: Path, *, compact: bool = False) -> None:
    """Write a record atomically; a compact one is a single line."""
    text = json.dumps(record, separators=(",", ":")) if compact else json.dumps(record, indent=1)
    write_text(path, f"{text}\n")


def versions() -> dict[str, str | None]:
    """Versions of the packages that affect a figure; None for those not installed.

    torch reports its own version, as a wheel's metadata may omit the build (2.13.0 for 2.13.0+cu130).
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = None
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found | {"torch": str(torch.__version__)}


def describe_error(error: BaseException) -> dict[str, str]:
    """An error as data. Only the innermost function of the trace is kept, so no path of the machine is stored."""
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
    """The value after a round trip through JSON, so a configuration can be compared with one read from a file."""
    return json.loads(json.dumps(value))


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", name)
