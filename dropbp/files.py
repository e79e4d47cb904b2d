"""Files that are written completely or not at all, and checks that a file is complete."""

from __future__ import annotations

import json
import os
import re
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
LAST_WRITTEN = "trainer_state.json"  # transformers writes it last: if it is complete, so is the checkpoint


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path with the suffix of `path`; it replaces `path` if the block ends without an error.

    The data is flushed to disk before the file gets its name. After a power failure either the old file or the new one
    is there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def last_whole_checkpoint(
    folder: Path, required: Mapping[str, str] = MappingProxyType({})
) -> tuple[Path | None, dict[str, str]]:
    """The latest complete checkpoint (None: there is none), and by folder name what is wrong with the later ones.

    A trainer that is killed during a save leaves a folder with missing or truncated files. `required` holds names and
    patterns of files that a checkpoint must have, unless it has a sharded engine's subfolders.
    """
    faults: dict[str, str] = {}
    for checkpoint in _checkpoints(folder):
        fault = _fault_in(checkpoint, required)
        if fault is None:
            return checkpoint, faults
        faults[checkpoint.name] = fault
    return None, faults


def fault_of(path: Path) -> str | None:
    """Why a JSON, safetensors or torch zip file is incomplete; None if it looks complete.

    Reads no tensors and unpickles nothing.
    """
    check = {".json": _json_fault, ".safetensors": _safetensors_fault, ".pt": _zip_fault, ".pth": _zip_fault}
    try:
        return check[path.suffix](path) if path.suffix in check else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{path.name} is damaged ({type(error).__name__})"


def _checkpoints(folder: Path) -> list[Path]:
    """Latest first."""
    found = {path: CHECKPOINT.fullmatch(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
    steps = {path: int(match[1]) for path, match in found.items() if match and path.is_dir()}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def _fault_in(checkpoint: Path, required: Mapping[str, str]) -> str | None:
    if not (checkpoint / LAST_WRITTEN).is_file():
        return f"{LAST_WRITTEN}, which is written last, is missing"
    paths = sorted(checkpoint.iterdir())
    if not any(map(_holds_weights, paths)):
        return "the weights are missing"
    missing = [name for name, pattern in required.items() if not any(_is_or_replaces(path, pattern) for path in paths)]
    if missing:
        return f"{missing[0]} is missing"
    return next(filter(None, map(fault_of, paths)), None)


def _is_or_replaces(path: Path, pattern: str) -> bool:
    return path.match(pattern) or path.is_dir()


def _holds_weights(path: Path) -> bool:
    """Sharded engines write the weights into a subfolder."""
    return path.is_dir() or (path.suffix in (".safetensors", ".bin") and path.name != "training_args.bin")


def _json_fault(path: Path) -> str | None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == LAST_WRITTEN and (type(content["global_step"]) is not int or content["global_step"] < 1):
        return f"{path.name} does not say which step it is of"
    if path.name == "adapter_config.json" and not isinstance(content, dict):
        return f"{path.name} is damaged: it is not a JSON object"
    return None


def _zip_fault(path: Path) -> str | None:
    """A zip file ends with its directory, so a truncated file has none."""
    return None if zipfile.is_zipfile(path) else f"{path.name} is truncated"


def _safetensors_fault(path: Path) -> str | None:
    """The header gives the end of each tensor. Source: https://github.com/huggingface/safetensors#format."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            return f"{path.name} is truncated"
        header = json.loads(file.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    complete = path.stat().st_size == 8 + length + max(ends, default=0)
    return None if complete else f"{path.name} is truncated"
