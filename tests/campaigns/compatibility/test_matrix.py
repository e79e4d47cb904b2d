"""The page is made from the recorded cells; none of them fails, and some are run again here."""

from __future__ import annotations

import pytest

from tests.campaigns.compatibility.cells import FAILS, WORKS, try_cell
from tests.campaigns.compatibility.page import CELLS, PAGE, read, render
from tests.campaigns.compatibility.stacks import STEPS

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_page_is_made_from_the_recorded_cells():
    assert render(read()) == PAGE.read_text(encoding="utf-8")


def test_every_cell_is_recorded_and_none_fails():
    record = read()
    assert sorted(record["cells"]) == sorted(CELLS)
    assert record["steps"] == STEPS
    assert not [name for name, cell in record["cells"].items() if cell["status"] == FAILS]


def test_cells_that_do_not_work_have_a_reason():
    assert all(cell["error"] for cell in read()["cells"].values() if cell["status"] != WORKS)


@pytest.mark.parametrize("engine", ["one process", "checkpointing"])
@pytest.mark.parametrize("tuning", ["full", "LoRA", "QLoRA"])
@pytest.mark.parametrize("stack", ["your own loop", "accelerate", "transformers Trainer"])
def test_repeated_cells_have_the_recorded_outcome(stack, tuning, engine):
    if tuning == "QLoRA":
        pytest.importorskip("bitsandbytes")
    assert try_cell(stack, tuning, engine) == read()["cells"][f"{stack} | {tuning} | {engine}"]
