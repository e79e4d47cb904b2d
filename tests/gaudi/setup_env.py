"""Finish the environment of `make test-gaudi`: run by that environment's Python, after its packages are installed.

optimum-habana runs `pip list` to find the version of Gaudi's PyTorch plugin, and one of its tokenizers imports
torchvision, of which PyTorch's CPU build has none in the package index. Neither is used in a test, so both get a
stand-in: a distribution with nothing but metadata, and an empty module that has no metadata (so that transformers still
takes torchvision to be absent).
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

PLUGIN, PLUGIN_VERSION = "habana-torch-plugin", "1.24.0"


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    write_plugin(packages)
    if importlib.util.find_spec("torchvision") is None:
        write_torchvision(packages / "torchvision")


def write_plugin(packages: Path) -> None:
    info = packages / f"{PLUGIN.replace('-', '_')}-{PLUGIN_VERSION}.dist-info"
    info.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: {PLUGIN_VERSION}\nSummary: Stand-in for tests\n"
    (info / "METADATA").write_text(metadata)
    (info / "INSTALLER").write_text("tests/gaudi/setup_env.py\n")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def write_torchvision(folder: Path) -> None:
    (folder / "transforms").mkdir(parents=True, exist_ok=True)
    for module in (folder, folder / "transforms"):
        (module / "__init__.py").write_text('"""Stand-in for tests: see tests/gaudi/setup_env.py of dropbp."""\n')


if __name__ == "__main__":
    main()
