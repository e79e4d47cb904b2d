"""The snippets of docs/integrations.md for stacks that are not installed here, against stand-ins of what they call."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from dropbp.integrations.transformers import DropBPCallback

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"


def snippet(title: str, language: str = "text") -> str:
    """The code that imports something of the stack of this name, or its settings."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of this name, and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    sys.modules[name].__dict__.update(contents)


@pytest.fixture
def axolotl(monkeypatch) -> Any:
    """Our plugin for Axolotl: with the real package where it is installed, else with a stand-in for its base class."""
    if importlib.util.find_spec("axolotl") is None:
        stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    module = importlib.import_module("dropbp.integrations.axolotl")
    yield module
    sys.modules.pop(module.__name__)


def test_axolotl_enables_dropbp_from_its_configuration_file(axolotl):
    written = yaml.safe_load(snippet("Axolotl", "yaml"))
    (name,) = written["plugins"]
    module, _, plugin_class = name.rpartition(".")
    plugin = getattr(importlib.import_module(module), plugin_class)()
    module, _, arguments = plugin.get_input_args().rpartition(".")
    checked = getattr(importlib.import_module(module), arguments)(dropbp=written["dropbp"]).model_dump()
    (callback,) = plugin.add_callbacks_post_trainer(checked, trainer=None)
    assert isinstance(callback, DropBPCallback)
    assert callback.drop_rate == written["dropbp"]["drop_rate"] and callback.masks == written["dropbp"]["masks"]
    assert plugin.add_callbacks_post_trainer({"dropbp": True}, None)[0].drop_rate == 0.5
    for off in ({}, {"dropbp": False}, {"dropbp": None}):
        assert plugin.add_callbacks_post_trainer(off, trainer=None) == []


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"droprate": 0.5}, "droprate"),
        ({"drop_rate": 1.5}, "drop_rate"),
        ({"masks": "most"}, "nested"),
        (0.5, "dropbp"),
    ],
)
def test_axolotls_configuration_is_checked_before_a_model_is_loaded(axolotl, wrong, named):
    with pytest.raises(ValueError, match=named):
        axolotl.DropBPArgs(dropbp=wrong)


def test_llama_factorys_script_passes_its_configuration_and_the_callback(monkeypatch, tmp_path):
    calls: list[dict[str, Any]] = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda **options: calls.append(options))
    (tmp_path / "train.yaml").write_text("stage: sft\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(snippet("LLaMA-Factory"), {})
    assert calls[0]["args"] == {"stage": "sft"}
    assert isinstance(calls[0]["callbacks"][0], DropBPCallback)


def test_ms_swifts_plugin_registers_the_callback(monkeypatch):
    known: dict[str, Any] = {}
    stand_in(monkeypatch, "swift", callbacks_map=known)
    exec(snippet("ms-swift"), {})
    assert isinstance(known["dropbp"](args=None, trainer=None), DropBPCallback)
