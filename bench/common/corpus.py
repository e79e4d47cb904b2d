"""Text that every Python installation contains: source code to train a base on, English prose to fine-tune it on.

The code is the standard library; the prose is the language reference behind `help("topics")`. Nothing is downloaded,
and both come in a fixed order, so two runs on one installation see the same bytes.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dropbp.errors import ConfigError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"})


def source_code(max_bytes: int) -> str:
    """Source files of the standard library, in alphabetical order, at most `max_bytes` of them in UTF-8.

    Raises:
        ConfigError: this machine has no sources of the standard library.
    """
    return joined(map(read, python_files()), max_bytes, "the standard library's sources")


def english_prose(max_bytes: int) -> str:
    """The Python language reference as plain text, at most `max_bytes` of it in UTF-8.

    Raises:
        ConfigError: this Python has no `pydoc_data.topics`.
    """
    return joined(_topics(), max_bytes, "the module pydoc_data.topics")


def digest(text: str) -> str:
    """A short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def python_files(wanted: Callable[[str], bool] = lambda top: True) -> list[Path]:
    """Source files of the standard library, without tests, whose top-level package or file name is wanted."""
    root = Path(sysconfig.get_path("stdlib"))
    places = (path.relative_to(root) for path in root.rglob("*.py"))
    found = sorted(place for place in places if _NOT_LIBRARY.isdisjoint(place.parts) and wanted(place.parts[0]))
    return [root / place for place in found]


def read(path: Path) -> str:
    """The text of a file, without bytes that are not UTF-8."""
    return path.read_text(encoding="utf-8", errors="ignore")


def joined(texts: Iterable[str], max_bytes: int, what: str) -> str:
    """The texts concatenated, at most `max_bytes` in UTF-8. Raises ConfigError if there are none."""
    parts, total = [], 0
    for text in texts:
        parts.append(text)
        total += len(text.encode())
        if total >= max_bytes:
            break
    if not parts:
        raise ConfigError(f"{what} cannot be read on this machine, so there is no text; install a complete Python.")
    return "\n".join(parts).encode()[:max_bytes].decode(errors="ignore")


def _topics() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


class Windows:
    """Windows at random positions of a text, as bytes."""

    def __init__(self, text: str, rows: int, length: int, seed: int = 0) -> None:
        self.data, self.rows, self.length = as_bytes(text), rows, length
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> Tensor:
        """The next windows, shape (B, S)."""
        starts = torch.randint(len(self.data) - self.length, (self.rows,), generator=self.generator)
        return windows(self.data, starts, self.length)


def as_bytes(text: str) -> Tensor:
    """The bytes of a text in UTF-8, as tokens."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    """Parts of the data from these positions on, shape (B, S)."""
    return torch.stack([data[start : start + length] for start in starts.tolist()])
