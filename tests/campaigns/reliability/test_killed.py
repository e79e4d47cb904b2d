"""Kill -9 while training and while a checkpoint is written: nothing already saved is lost."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.reliability.registry import CHECKS


def test_a_command_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    CHECKS["kill"].run(CHECKS["kill"].few, tmp_path)
