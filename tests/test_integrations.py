"""The snippets of docs/integrations.md for stacks that are not installed here, against stand-ins of what they call."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dropbp.integrations.transformers import DropBPCallback

PAGE = Path(__file__).parents[1] / "docs" / "integrations.md"


def snippet(title: str) -> str:
    """The code that imports something of the stack of this name."""
    section = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """A module of this name, and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    sys.modules[name].__dict__.update(contents)


def test_axolotls_plugin_gives_its_trainer_the_callback(monkeypatch):
    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    names: dict[str, Any] = {}
    exec(snippet("Axolotl"), names)
    plugin = names["DropBPPlugin"]()
    (callback,) = plugin.add_callbacks_post_trainer({"dropbp_drop_rate": 0.75}, trainer=None)
    assert isinstance(callback, DropBPCallback) and callback.drop_rate == 0.75
    assert plugin.add_callbacks_post_trainer({}, trainer=None)[0].drop_rate == 0.5


def test_llama_factorys_script_hands_over_the_file_and_the_callback(monkeypatch, tmp_path):
    calls: list[dict[str, Any]] = []
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=lambda **options: calls.append(options))
    (tmp_path / "train.yaml").write_text("stage: sft\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(snippet("LLaMA-Factory"), {})
    assert calls[0]["args"] == {"stage": "sft"}
    assert isinstance(calls[0]["callbacks"][0], DropBPCallback)
