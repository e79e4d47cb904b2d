"""Build the wheel from a copy of the sources, so nothing is written into them, and install it elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dropbp", "backends", "bench")


def _copy_sources(target: Path) -> None:
    for source in (ROOT / name for name in SOURCES):
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target)


def _run(*command: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(workdir: Path) -> Path:
    """Build the wheel of the current sources in `workdir`."""
    sources = workdir / "sources"
    sources.mkdir(parents=True)
    _copy_sources(sources)
    _run("build", "--wheel", "--no-isolation", "--outdir", workdir / "dist", sources)
    (wheel,) = (workdir / "dist").glob("*.whl")
    return wheel


def install_wheel(wheel: Path, target: Path) -> Path:
    """Install the wheel without its dependencies into the folder `target`."""
    _run("pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target
