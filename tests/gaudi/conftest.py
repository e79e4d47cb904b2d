"""Everything here needs optimum-habana, and says so where it is missing."""

import importlib.util

import pytest

HERE = __name__.rpartition(".")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = importlib.util.find_spec("optimum.habana") is None if importlib.util.find_spec("optimum") else True
    for item in items:
        if "gaudi" in item.path.parts and missing:
            item.add_marker(pytest.mark.skip(reason="optimum-habana is not installed: run `make test-gaudi`"))
