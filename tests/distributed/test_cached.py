"""The activation cache on two processes."""

from __future__ import annotations

import pytest

from tests.distributed.cached import EPOCHS, ROWS
from tests.distributed.compare import result


@pytest.mark.parametrize("case", ["ddp", "ddp, in a folder", "fsdp2"])
def test_losses_are_those_without_the_cache(ranks, case):
    for rank in ranks("cached"):
        found = result(rank, case)
        report = found["report"]
        assert (report["refused"], report["objections"], report["trouble"]) == (None, [], None)
        assert report["hits"] > 0
        assert found["losses"] == pytest.approx(found["plain"], rel=1e-4)


def test_in_a_folder_each_rank_finds_what_the_other_has_stored(ranks):
    for rank in ranks("cached"):
        report = result(rank, "ddp, in a folder")["report"]
        assert report["looked_up"] == EPOCHS * ROWS // 2
        assert report["hits"] == (EPOCHS - 1) * ROWS // 2
