"""Each engine is launched once, whichever of the test processes asks for it first."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.launch import LAUNCHERS, launch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "distributed":
            item.add_marker(pytest.mark.distributed)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """Results of an engine's cases, one dict for each rank; `by` is one of the launchers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def results(module: str, by: str = "torchrun", cases: tuple[str, ...] = ()) -> list[dict[str, Any]]:
        stored = shared / f"{module} by {by} {' '.join(cases)}.json"
        with stored.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not stored.exists():
                stored.write_text(json.dumps(launch(module, cases, **LAUNCHERS[by])), encoding="utf-8")
        return json.loads(stored.read_text(encoding="utf-8"))

    return results
