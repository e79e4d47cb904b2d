"""Builds the simulator's C++ extension on demand and loads it.

The library is kept in a cache folder named by the hash of the source, the PyTorch version and the interpreter, so a
change to any of them triggers a new build. It is built in a scratch folder under a file lock and moved into place by
one rename. So two processes that start together build it once, and an interrupted build is never taken for a finished
one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from dropbp.errors import DeviceError

logger = logging.getLogger(__name__)

MODULE_NAME = "dropbp_hpu_simulator"
SOURCE_DIR = Path(__file__).resolve().parent


def sources() -> list[Path]:
    """The shipped C++ files."""
    return [SOURCE_DIR / "simulator.cpp", *sorted(SOURCE_DIR.glob("*.h"))]


def cache_root() -> Path:
    """Where built libraries are kept: ``$DROPBP_CACHE_DIR``, else ``$XDG_CACHE_HOME/dropbp``, else ``~/.cache``."""
    if "DROPBP_CACHE_DIR" in os.environ:
        return Path(os.environ["DROPBP_CACHE_DIR"]) / "hpu_simulator"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dropbp" / "hpu_simulator"


def cache_key() -> str:
    """Hash of everything the binary depends on."""
    import torch

    digest = hashlib.sha256(f"{torch.__version__} {torch.version.git_version} {sys.version} {_platform()}".encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"torch{torch.__version__}-{digest.hexdigest()[:16]}".replace("+", "-")


def _platform() -> str:
    return f"{sys.platform} {os.uname().machine}"


def load() -> ModuleType:
    """The loaded extension, built first if necessary.

    Raises:
        DeviceError: there is no compiler, or the compiler failed.
    """
    if MODULE_NAME not in sys.modules:
        sys.modules[MODULE_NAME] = _load(cache_root() / cache_key())
    return sys.modules[MODULE_NAME]


def _load(folder: Path) -> ModuleType:
    library = folder / f"{MODULE_NAME}.so"
    if not library.exists():
        with _locked(folder.parent / f"{folder.name}.lock"):
            if not library.exists():
                return _build_into(folder)
    return _import(library)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build_into(folder: Path) -> ModuleType:
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        module = _compile(scratch)
        _publish(scratch, folder)
        return module
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, folder: Path) -> None:
    finished = scratch / "finished"
    finished.mkdir()
    (scratch / f"{MODULE_NAME}.so").rename(finished / f"{MODULE_NAME}.so")
    shutil.rmtree(folder, ignore_errors=True)
    finished.rename(folder)


def _compile(scratch: Path) -> ModuleType:
    from torch.utils import cpp_extension

    _require_tools()
    logger.info("building the simulated HPU in %s (once per PyTorch version; about half a minute)", scratch.parent)
    try:
        with _tools_on_path():
            module: ModuleType = cpp_extension.load(
                name=MODULE_NAME,
                sources=[str(SOURCE_DIR / "simulator.cpp")],
                extra_cflags=["-O1", "-g0"],
                extra_include_paths=[str(SOURCE_DIR)],
                build_directory=str(scratch),
            )
    except RuntimeError as error:
        raise DeviceError(f"The simulated HPU did not build with {_compiler()!r}:\n{error}") from error
    return module


def _require_tools() -> None:
    path = _search_path()
    missing = [tool for tool in (_compiler(), "ninja") if shutil.which(shlex.split(tool)[0], path=path) is None]
    if missing:
        raise DeviceError(
            f"The simulated HPU is a C++ extension, built on first use; not found: {', '.join(missing)}. "
            "It needs a C++17 compiler (set CXX to name one) and ninja. "
            "Install them (for example the packages 'g++' and 'ninja-build', or 'pip install ninja'), "
            "or use another device."
        )


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _search_path() -> str:
    """``PATH``, and the interpreter's scripts folder, which holds ``ninja`` if the environment is not activated."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


@contextlib.contextmanager
def _tools_on_path() -> Iterator[None]:
    saved = os.environ.get("PATH")
    os.environ["PATH"] = _search_path()
    try:
        yield
    finally:
        os.environ.pop("PATH") if saved is None else os.environ.update(PATH=saved)


def _import(library: Path) -> ModuleType:
    import torch  # noqa: F401  (loads the libraries that the extension links against)

    spec = importlib.util.spec_from_file_location(MODULE_NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
