"""Kill -9 while training and while a checkpoint is written: nothing already saved is lost."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.reliability.registry import CHECKS


def test_a_command_killed_repeatedly_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    CHECKS["kill"].run(CHECKS["kill"].few, tmp_path)
