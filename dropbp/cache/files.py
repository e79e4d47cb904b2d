"""Stores states in a folder that processes and later runs share, safely whatever ends a process.

Each border has a folder, named by the fingerprint of what is below it. Each process appends to a file of its own in it.
A record is a header and the numbers, each with a checksum. A record that is truncated, damaged or not finite counts as
missing, so the row runs in full again. Files of other processes are read, and read again as they grow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch

from dropbp.cache.fingerprint import Fingerprints
from dropbp.cache.rows import KEY_BYTES, content
from dropbp.cache.store import RowState
from dropbp.errors import StateError

logger = logging.getLogger(__name__)

SHARE_OF_DISK = 0.5  # of the free space, unless a limit is given
SUFFIX = ".rows"
MAGIC = b"DBPROWS1"
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEADER = struct.Struct("<8sB31sBB6xIIIIQIxxxx")  # magic, key, type, dimensions, their sizes, bytes, checksum
CHECK = struct.Struct("<I")
RESCAN_AFTER_S = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class RecordLocation:
    """Position and format of a record's numbers."""

    path: Path
    offset: int
    nbytes: int
    kind: torch.dtype
    shape: tuple[int, ...]
    checksum: int


class FileStore:
    """States in a folder, up to a limit in bytes; None: a share of the free disk space."""

    def __init__(self, folder: Path, fingerprints: Fingerprints, limit: int | None = None) -> None:
        self.folder, self._fingerprints = folder, fingerprints
        self.full = False
        self.trouble: str | None = None
        self._index: dict[int, dict[bytes, RecordLocation]] = {}
        self._read: dict[Path, int] = {}
        self._files: dict[int, tuple[Path, int]] = {}
        self._scanned_s = 0.0
        self._name = f"{os.getpid()}-{uuid.uuid4().hex}{SUFFIX}"
        with self._disk():
            folder.mkdir(parents=True, exist_ok=True)
        self._taken = sum(path.stat().st_size for path in folder.glob(f"*/*{SUFFIX}"))
        self.limit = limit
        if limit is None and folder.is_dir():
            self.limit = self._taken + int(shutil.disk_usage(folder).free * SHARE_OF_DISK)

    @property
    def rows(self) -> int:
        """Number of rows, without states of padding."""
        return len({key for index in self._index.values() for key in index if len(key) == KEY_BYTES})

    @property
    def nbytes(self) -> int:
        """Bytes of the states that can be found now."""
        return sum(place.nbytes for index in self._index.values() for place in index.values())

    def open_border(self, border: int) -> None:
        """Look for states up to a border."""
        for each in range(1, border + 1):
            if each not in self._index:
                self._index[each] = {}
                self._scan_border(each)

    def border(self, key: bytes) -> int:
        found = self._border(key)
        if not found and time.monotonic() - self._scanned_s > RESCAN_AFTER_S:
            self._scanned_s = time.monotonic()
            for border in self._index:
                self._scan_border(border)
            found = self._border(key)
        return found

    def _border(self, key: bytes) -> int:
        return max((border for border, index in self._index.items() if key in index), default=0)

    def get(self, key: bytes) -> RowState | None:
        border = self._border(key)
        place = self._index[border].get(key) if border else None
        values = None if place is None else _values(place)
        if values is None and border:
            del self._index[border][key]
        return None if values is None else RowState(border, values)

    def put(self, key: bytes, state: RowState) -> None:
        """Append a state to this process's file."""
        numbers = content(state.values)
        record = _record(key, state, numbers)
        if self.limit is not None and self._taken + len(record) > self.limit:
            self.full = True
            return
        with self._disk():
            path, offset = self._append(state.border, record)
            kind, shape = state.values.dtype, tuple(state.values.shape)
            place = RecordLocation(
                path, offset + HEADER.size + CHECK.size, len(numbers), kind, shape, zlib.crc32(numbers)
            )
            self._index.setdefault(state.border, {})[key] = place
            self._taken += len(record)

    def drop_above(self, border: int) -> None:
        """Forget the states above a border. The files stay, for runs with those weights."""
        self._fingerprints.forget_above(border)
        for each in [each for each in self._index if each > border]:
            del self._index[each]
            descriptor = self._files.pop(each, None)
            if descriptor is not None:
                os.close(descriptor[1])
        self._read.clear()

    def close(self) -> None:
        self.drop_above(0)

    # -- files

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Stop storing at the first error; training continues."""
        try:
            yield
        except (OSError, StateError) as error:
            if self.trouble is None:
                self.trouble = str(error)
                logger.warning(
                    "Nothing more is stored in %s (%s). Training continues and uses the rows stored so far.",
                    self.folder, error,
                )  # fmt: skip

    def _folder(self, border: int) -> Path:
        return self.folder / self._fingerprints.at(border)

    def _append(self, border: int, record: bytes) -> tuple[Path, int]:
        if border not in self._files:
            folder = self._folder(border)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{len(self._files)}-{self._name}"
            self._files[border] = path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        path, descriptor = self._files[border]
        offset = os.fstat(descriptor).st_size
        written = 0
        try:
            while written < len(record):
                written += os.write(descriptor, record[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, offset)
            raise
        self._read[path] = offset + len(record)
        return path, offset

    def _scan_border(self, border: int) -> None:
        """Index the records in the files of a border that this process has not seen."""
        with self._disk():
            for path in sorted(self._folder(border).glob(f"*{SUFFIX}")):
                seen = self._read.get(path, 0)
                if path.stat().st_size > seen:
                    self._read[path] = _scan(path, seen, self._index[border])


def _record(key: bytes, state: RowState, numbers: bytes) -> bytes:
    shape = (*state.values.shape, 0, 0, 0, 0)[:4]
    kind, dims = TYPES.index(state.values.dtype), state.values.dim()
    header = HEADER.pack(MAGIC, len(key), key, kind, dims, *shape, len(numbers), zlib.crc32(numbers))
    return header + CHECK.pack(zlib.crc32(header)) + numbers


def _scan(path: Path, start: int, index: dict[bytes, RecordLocation]) -> int:
    """Index the complete records from an offset on; return where they end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while start + HEADER.size + CHECK.size <= size:
            file.seek(start)
            found = _header(file.read(HEADER.size + CHECK.size))
            if found is None:  # nothing after a damaged header can be trusted
                return size
            key, kind, shape, nbytes, checksum = found
            offset = start + HEADER.size + CHECK.size
            if offset + nbytes > size:
                break
            index[key] = RecordLocation(path, offset, nbytes, kind, shape, checksum)
            start = offset + nbytes
    return start


def _header(data: bytes) -> tuple[bytes, torch.dtype, tuple[int, ...], int, int] | None:
    header, check = data[: HEADER.size], data[HEADER.size :]
    if CHECK.unpack(check)[0] != zlib.crc32(header):
        return None
    magic, length, key, kind, dims, *sizes, nbytes, checksum = HEADER.unpack(header)
    if magic != MAGIC or kind >= len(TYPES) or dims > len(sizes):
        return None
    return key[:length], TYPES[kind], tuple(sizes[:dims]), nbytes, checksum


def _values(place: RecordLocation) -> torch.Tensor | None:
    """The numbers of a record; None if they are damaged or not finite."""
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            data = bytearray(file.read(place.nbytes))
    except OSError:
        return None
    if len(data) != place.nbytes or zlib.crc32(data) != place.checksum:
        return None
    values = torch.frombuffer(data, dtype=place.kind).reshape(place.shape)
    return values if bool(values.isfinite().all()) else None
