"""Cycles, threads and long runs: nothing is kept, nothing drifts. In full: `python -m tests.campaigns.reliability`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import dropbp
from tests.campaigns.reliability.endurance import OBJECTS, _flat
from tests.campaigns.reliability.registry import CHECKS, LEAKS, LONG
from tests.common.engine_models import plain_batch, plain_net


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.part == LEAKS])
def test_nothing_is_kept(name: str, tmp_path: Path) -> None:
    CHECKS[name].run(CHECKS[name].few, tmp_path)


@pytest.mark.parametrize("name", [name for name, check in CHECKS.items() if check.part == LONG])
def test_a_run_realises_its_rate_and_keeps_nothing(name: str, tmp_path: Path) -> None:
    figures = CHECKS[name].run(CHECKS[name].few, tmp_path)
    assert figures["realised_drop_rate"] == pytest.approx(0.5, abs=0.01)
    assert figures["loss"][1] < figures["loss"][0]


def test_the_check_of_leaks_can_fail() -> None:
    counts = (0, 10, 11 + OBJECTS)
    with pytest.raises(AssertionError, match=f"10 objects became {counts[-1]}: {OBJECTS + 1} list"):
        _flat([(Counter(list=count), 0) for count in counts])


def test_two_models_enabled_and_removed_in_any_order_stay_apart() -> None:
    one, two = plain_net(), plain_net()
    first = dropbp.enable(one, example_inputs=plain_batch())
    second = dropbp.enable(two, example_inputs=plain_batch())
    first.remove()
    assert second.enabled and "forward" in two.__dict__ and "forward" not in one.__dict__
    second.remove()
    assert not any("forward" in module.__dict__ for net in (one, two) for module in net.modules())
