"""Text that every Python installation carries: source code to train a base on, English prose to fine-tune it on.

The code is the standard library's own; the prose is the language reference behind `help("topics")`. Nothing is
downloaded, and both come in a fixed order, so that two runs on one installation see the same bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from dropbp.errors import ConfigError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"})


def source_code(max_bytes: int) -> str:
    """Source files of the standard library, in alphabetical order, `max_bytes` of them in UTF-8 at most.

    Raises:
        ConfigError: the standard library's sources are not on this machine.
    """
    return _take(_source_files(), max_bytes, "the standard library's sources")


def english_prose(max_bytes: int) -> str:
    """The Python language reference as plain text, `max_bytes` of it in UTF-8 at most.

    Raises:
        ConfigError: this Python comes without `pydoc_data.topics`.
    """
    return _take(_topics(), max_bytes, "the module pydoc_data.topics")


def digest(text: str) -> str:
    """A short name for a text: the same for the same bytes."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _source_files() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            yield path.read_text(encoding="utf-8", errors="ignore")


def _topics() -> Iterator[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


def _take(texts: Iterator[str], max_bytes: int, what: str) -> str:
    parts, total = [], 0
    for text in texts:
        parts.append(text)
        total += len(text.encode())
        if total >= max_bytes:
            break
    if not parts:
        raise ConfigError(
            f"{what} cannot be read on this machine, so there is nothing to train the embedded example on; "
            "give --model and --dataset, or install a complete Python."
        )
    return "\n".join(parts).encode()[:max_bytes].decode(errors="ignore")
