"""Optimizer and clipping cut by branch: the same result as uncut, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from dropbp.integrations.transformers import DropBPCallback
from tests.common.engine_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
STEPS = 8


class Tokens(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + 3 * torch.arange(8)) % 32
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(folder: Path, *, by_branch: bool, **options: Any) -> Any:
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_grad_norm=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": STEPS} | options,
    )
    callback = DropBPCallback(0.5, masks="exact", calibrate_at=None, group_parameters=by_branch)
    return Trainer(tiny_llama(layers=3), arguments, train_dataset=Tokens(), callbacks=[callback])


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    trainer = make_trainer(tmp_path_factory.mktemp("uncut"), by_branch=False)
    trainer.train()
    return weights(trainer)


def test_an_optimizer_split_by_branch_equals_the_unsplit_one(uncut: dict[str, torch.Tensor], tmp_path: Path):
    trainer = make_trainer(tmp_path, by_branch=True)
    trainer.train()
    for name, weight in weights(trainer).items():
        torch.testing.assert_close(weight, uncut[name], rtol=1e-5, atol=1e-6)


def test_optimizer_and_accelerator_are_restored(tmp_path: Path):
    trainer = make_trainer(tmp_path, by_branch=True)
    trainer.train()
    assert "clip_grad_norm_" not in vars(trainer.accelerator)
    assert not any("dropbp_parts" in group for group in trainer.optimizer.param_groups)
    assert len(trainer.optimizer.param_groups) == 2  # the trainer's own: with decay and without


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_of_split_and_unsplit_optimizers_are_interchangeable(
    first: bool, uncut: dict[str, torch.Tensor], tmp_path: Path
):
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    make_trainer(tmp_path, by_branch=first, **saving).train()
    resumed = make_trainer(tmp_path, by_branch=not first)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    for name, weight in weights(resumed).items():
        torch.testing.assert_close(weight, uncut[name], rtol=1e-5, atol=1e-6)
