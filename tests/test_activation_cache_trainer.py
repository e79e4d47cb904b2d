"""The activation cache in the Trainer of transformers and in TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from dropbp.cli.main import main
from dropbp.integrations.transformers import DropBPCallback
from tests.common.tiny import make_model, make_tokenizer, save_model, sums, write_jsonl

ROWS, EPOCHS = 16, 3
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "learning_rate": 1e-3,
    "num_train_epochs": EPOCHS,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
    "use_cpu": True,
}


def data(rows: int = ROWS, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (rows,), generator=generator).tolist()
    return Dataset.from_list(
        [{"input_ids": torch.randint(4, 300, (length,), generator=generator).tolist()} for length in lengths]
    )


def trained(
    folder: Path, where: Any, kind: str = "Trainer", side: str = "right", width: int = 32, **options: Any
) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.padding_side = side
    callback = DropBPCallback(drop_rate=0.75, activation_cache=where, calibrate_at=None)
    arguments = {**ARGUMENTS, **options}
    common = {
        "model": make_model(layers=6, width=width),
        "train_dataset": data(),
        "eval_dataset": data(8, seed=1),
        "processing_class": tokenizer,
        "callbacks": [callback],
    }
    if kind == "Trainer":
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(args=TrainingArguments(output_dir=str(folder), **arguments), data_collator=collator, **common)
    else:
        trainer = SFTTrainer(args=SFTConfig(output_dir=str(folder), **arguments), **common)
    trainer.train()
    return trainer, callback


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


CASES = {
    "Trainer": {},
    "Trainer, padded on the left": {"side": "left"},
    "Trainer, accumulated": {"gradient_accumulation_steps": 2},
    "Trainer, checkpointed": {"gradient_checkpointing": True},
    "SFTTrainer": {"kind": "SFTTrainer"},
}


@pytest.mark.parametrize("case", CASES)
def test_every_row_is_known_from_the_second_epoch_and_the_losses_are_the_same(tmp_path: Path, case: str) -> None:
    plain, _ = trained(tmp_path / "plain", None, **CASES[case])
    trainer, callback = trained(tmp_path / "cached", True, **CASES[case])
    report = callback.report()["activation_cache"]
    assert (report["refused"], report["objections"]) == (None, [])
    assert report["looked_up"] == EPOCHS * ROWS and report["hits"] == (EPOCHS - 1) * ROWS
    assert report["forwards_shortened"] >= (EPOCHS - 1) * ROWS // 2 - 2
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-3)


def test_evaluations_find_their_rows_too(tmp_path: Path) -> None:
    trainer, callback = trained(tmp_path, True, eval_strategy="epoch")
    plain, _ = trained(tmp_path, None, eval_strategy="epoch")
    report = callback.report()["activation_cache"]
    assert report["looked_up"] == EPOCHS * (ROWS + 8) and report["hits"] == (EPOCHS - 1) * (ROWS + 8)
    evals = [[e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (trainer, plain)]
    assert evals[0] == pytest.approx(evals[1], abs=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_precision_that_a_trainer_sets_inside_the_forward_counts(tmp_path: Path, side: str) -> None:
    """accelerate wraps the forward in autocast, so the caller of the model is not under it."""
    folder, hits, differences = tmp_path / "states", [], []
    for place, bf16 in enumerate([False, True, True]):
        options = {"side": side, "bf16": bf16, "width": 128, "per_device_train_batch_size": 4}
        report = trained(tmp_path / str(place), str(folder), **options)[1].report()["activation_cache"]
        assert (report["refused"], report["objections"]) == (None, [])
        hits.append(report["hits"])
        differences.append(report["largest_difference"])
    assert report["rows"] == 2 * ROWS, "each precision has states of its own"
    assert hits == [(EPOCHS - 1) * ROWS, (EPOCHS - 1) * ROWS, EPOCHS * ROWS]
    assert differences[1] > 1e-4, "rounding of 16 bits is allowed where the blocks run in 16 bits"


def test_the_log_shows_what_the_cache_does(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, True)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert 0.5 < last["dropbp_cache_hit_share"] < 0.7
    assert last["dropbp_cache_gib"] > 0


class OtherRows(TrainerCallback):
    """Each epoch has rows of its own, as packing on the fly makes them."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        if state.epoch:
            train_dataloader.dataset.offset += 100


class Shifting(torch.utils.data.Dataset):
    offset = 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        ids = torch.randint(4, 300, (12,), generator=torch.Generator().manual_seed(self.offset + place)).tolist()
        return {"input_ids": ids, "labels": ids}


def test_rows_that_never_recur_are_noticed_and_freed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = DropBPCallback(drop_rate=0.75, activation_cache=True, calibrate_at=None)
    rows = Shifting()
    trainer = Trainer(
        model=make_model(layers=6),
        args=TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=rows,
        callbacks=[callback, OtherRows(rows)],
    )
    trainer.train()
    report = callback.report()["activation_cache"]
    assert "packed rows" in report["refused"] and report["bytes"] == 0
    assert caplog.text.count("packed rows") == 1


# -- the command


def finetune(folder: Path, output: str, *options: str) -> dict[str, Any]:
    model, rows = folder / "model", folder / "sums.jsonl"
    if not model.exists():
        save_model(model, layers=6)
        write_jsonl(rows, sums(12))
    sizes = ["--batch-size", "2", "--gradient-accumulation", "1", "--max-length", "128", "--device", "cpu"]
    what = ["--model", str(model), "--dataset", str(rows), "--output", str(folder / output), "--eval-fraction", "0"]
    assert main(["finetune", *what, *sizes, "--drop-rate", "0.75", "--epochs", "2", *options]) == 0
    run = json.loads((folder / output / "result.json").read_text())["runs"][0]
    return run["dropbp"].get("activation_cache", {})


def test_the_command_keeps_rows_in_memory_or_in_a_folder(tmp_path: Path) -> None:
    memory = finetune(tmp_path, "memory", "--peft", "none", "--activation-cache")
    assert memory["refused"] is None and memory["objections"] == [] and memory["hits"] == 12
    place = str(tmp_path / "states")
    first = finetune(tmp_path, "first", "--activation-cache", place)
    second = finetune(tmp_path, "second", "--activation-cache", place)
    assert first["hits"] == 12 and second["hits"] == 24, "the second run starts warm"


@pytest.mark.parametrize("options", [["--activation-cache"], ["--plain", "--activation-cache"]])
def test_the_command_says_where_the_cache_cannot_be_used(tmp_path: Path, options: list[str], capsys: Any) -> None:
    given = ["--model", "m", "--dataset", "d"] if "--plain" in options else []
    assert main(["finetune", *given, *options]) != 0
    assert "--activation-cache needs --model and --dataset" in capsys.readouterr().err
