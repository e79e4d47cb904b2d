"""`dropbp finetune --resume` from checkpoints of another run, or with damaged content: a line that names the file."""

from __future__ import annotations

import errno
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dropbp.cli.main import main
from tests.common.tiny import save_model, sums, write_jsonl

NAN = float("nan")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, data, and the folders of a run with adapters and of one that trains everything."""
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "data.jsonl", sums(16))
    for name, layers in {"model": 2, "twin": 2, "deeper": 3}.items():
        save_model(folder / name, layers=layers)
    assert finetune(folder, folder / "lora") == 0
    assert finetune(folder, folder / "none", "--peft", "none") == 0
    return folder


def finetune(inputs: Path, output: Path, *options: str, model: str = "model") -> int:
    given = {"model": inputs / model, "dataset": inputs / "data.jsonl", "output": output}
    fixed = {"max-steps": 2, "save-steps": 1, "gradient-accumulation": 1, "max-length": 96, "eval-fraction": 0}
    return main(["finetune", *(f"--{name}={value}" for name, value in (given | fixed).items()), *options])


def resumed(
    inputs: Path, output: Path, *options: str, run: str = "lora", model: str = "model", change: Any = None
) -> int:
    """Resume from the first step; `change` damages the checkpoint before."""
    target = output / "checkpoint-1"
    shutil.copytree(inputs / run / "checkpoint-1", target)
    if change is not None:
        change(target)
    return finetune(inputs, output, "--resume", *options, model=model)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("run", "model", "options", "message"),
    [
        ("lora", "deeper", (), "layers.2.mlp.down_proj.lora_A.weight is missing there and [8, 64] here"),
        ("none", "model", (), "holds a whole model. Pass --peft none"),
        ("lora", "model", ("--peft", "none"), "holds adapters. Pass --peft lora"),
        ("none", "deeper", ("--peft", "none"), "cannot be loaded: model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    inputs: Path,
    tmp_path: Path,
    run: str,
    model: str,
    options: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert resumed(inputs, tmp_path, *options, run=run, model=model) == 2
    line = last_line(capsys)
    assert message in line
    assert str(tmp_path / "checkpoint-1") in line


def saved_as(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def changed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def with_nan(path: Path) -> None:
    save_file({name: tensor * NAN for name, tensor in load_file(path).items()}, path)


def with_nan_in_its_state(path: Path) -> None:
    optimizer = torch.load(path, weights_only=True)
    for parts in optimizer["state"].values():
        parts["exp_avg"] *= NAN
    torch.save(optimizer, path)


def without_half(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensors[name] for name in sorted(tensors)[::2]}, path)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize(
    "damage",
    [Path.unlink, saved_as([1]), saved_as({}), other_zip],
    ids=["missing", "a list", "without its parts", "another archive"],
)
def test_errors_name_the_damaged_file_of_a_checkpoint(
    inputs: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(inputs, tmp_path, change=lambda checkpoint: damage(checkpoint / name)) == 2
    assert name in last_line(capsys)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("adapter_model.safetensors", with_nan, "lora_A.default.weight with values that are not finite"),
        ("adapter_model.safetensors", without_half, "is missing there"),
        ("optimizer.pt", with_nan_in_its_state, "optimizer state exp_avg with values that are not finite"),
        ("scheduler.pt", changed(lambda state: {**state, "base_lrs": "x"}), "scheduler.pt of"),
        ("scheduler.pt", changed(lambda state: {**state, "last_epoch": None}), "is damaged"),
        ("trainer_state.json", lambda path: path.write_text("[1]", encoding="utf-8"), "trainer_state.json is damaged"),
        ("trainer_state.json", lambda path: path.write_text('{"global_step": 0}', "utf-8"), "does not say which step"),
        ("adapter_config.json", lambda path: path.write_text("[1]", encoding="utf-8"), "it is not a JSON object"),
    ],
)
def test_damaged_content_is_refused(
    inputs: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert resumed(inputs, tmp_path, change=lambda checkpoint: damage(checkpoint / name)) == 2
    assert message in last_line(capsys)


def with_entry(name: str, value: Any, *path: str) -> Callable[[Path], None]:
    """Change an entry of trainer_state.json, or of the dictionary at `path` in it."""

    def change(checkpoint: Path) -> None:
        file = checkpoint / "trainer_state.json"
        state = entries = json.loads(file.read_text(encoding="utf-8"))
        for key in path:
            entries = entries[key]
        entries[name] = value
        file.write_text(json.dumps(state), encoding="utf-8")

    return change


RECORD = ("stateful_callbacks", "StepRecorder", "attributes")


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("eval_steps", None, ()),
        ("save_steps", 10**400, ()),
        ("total_flos", "x", ()),
        ("num_input_tokens_seen", None, ()),
        ("train_batch_size", [], ()),
        ("log_history", "x", ()),
        ("best_model_checkpoint", {}, ()),
        ("stateful_callbacks", 5, ()),
        ("StepRecorder", 5, RECORD[:1]),
        ("step_s", ["x"], RECORD),
    ],
)
def test_a_trainer_state_with_an_entry_of_another_type_is_refused(
    inputs: Path, tmp_path: Path, name: str, value: Any, path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(inputs, tmp_path, change=with_entry(name, value, *path)) == 2
    assert "trainer_state.json" in last_line(capsys)


def test_a_trainer_state_without_the_state_of_callbacks_is_resumed(inputs: Path, tmp_path: Path) -> None:
    assert resumed(inputs, tmp_path, "--plain", change=with_entry("stateful_callbacks", {})) == 0


def test_a_resumed_run_warns_of_settings_taken_from_its_checkpoint(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumed(inputs, tmp_path, "--learning-rate", "0.5", "--eval-steps", "2", "--plain", model="twin") == 0
    assert "the learning rate stays 0.0001" in caplog.text
    assert "between evaluations stays 1" in caplog.text
    assert "is of a run with DropBP; the rest of it runs without" in caplog.text
    assert f"were trained on {inputs / 'model'}, and --model is {inputs / 'twin'}" in caplog.text


def test_a_resumed_run_warns_of_other_data_and_other_batches(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = "--dataset", str(write_jsonl(tmp_path / "other.jsonl", sums(12))), "--gradient-accumulation", "2"
    assert resumed(inputs, tmp_path / "run", *options, "--batch-size", "1") == 0
    assert "the training data changes from 16 examples (hash " in caplog.text
    assert " to 12 examples (hash " in caplog.text
    assert "the number of examples per micro-batch changes from 2 to 1 for the rest of the run" in caplog.text
    assert "the number of micro-batches per step changes from 1 to 2 for the rest of the run" in caplog.text


def test_a_run_resumed_with_the_same_options_warns_of_nothing(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resumed(inputs, tmp_path) == 0
    assert "--resume" not in caplog.text


def test_a_full_disk_before_the_first_checkpoint_is_reported(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dropbp.cli.causal_lm.train", full)
    assert finetune(inputs, tmp_path) == 1
    assert last_line(capsys).endswith("Free disk space, or write elsewhere. No checkpoint was written before.")
