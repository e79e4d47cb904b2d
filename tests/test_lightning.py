"""`DropBPLightning` in Lightning's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import dropbp
from tests.common.engine_models import llama_loss, tiny_llama, tokens

lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")

from dropbp.integrations.lightning import DropBPLightning  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8


class Module(lightning.LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.model = tiny_llama(3)
        self.losses: list[float] = []
        self.fail_at = fail_at

    def training_step(self, batch: Any, index: int) -> Any:
        if index == self.fail_at:
            raise RuntimeError("the machine is on fire")
        loss = llama_loss(self.model, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder: Path, module: Module, callback: DropBPLightning, steps: int, resume: Path | None = None) -> Any:
    # The same batch again and again: Lightning restarts a plain loader when it resumes within an epoch.
    data = DataLoader([*tokens()] * STEPS, batch_size=2)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, default_root_dir=folder, logger=False, callbacks=[callback],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return trainer


def plain_losses() -> list[float]:
    """The same training by hand."""
    model = tiny_llama(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    with dropbp.enable(model, 0.5):
        for _ in range(STEPS):
            loss = llama_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_training_equals_a_loop_by_hand_and_restores_the_model(tmp_path: Path) -> None:
    module, callback = Module(), DropBPLightning(0.5)
    trainer = fit(tmp_path, module, callback, STEPS)
    assert module.losses == plain_losses()
    assert 0 < trainer.callback_metrics["dropbp_realised_drop_rate"] < 1
    assert callback.handle is None
    assert not any("forward" in part.__dict__ for part in module.model.modules())


def test_a_resumed_run_has_the_masks_of_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = plain_losses()
    first = Module()
    fit(tmp_path, first, DropBPLightning(0.5), 4).save_checkpoint(tmp_path / "half.ckpt")
    second, callback = Module(), DropBPLightning(0.5)
    fit(tmp_path, second, callback, STEPS, tmp_path / "half.ckpt")
    assert first.losses + second.losses == whole
    assert callback.state_dict()["handle"]["statistics"]["forwards"] == STEPS


def test_an_exception_removes_dropbp(tmp_path: Path) -> None:
    module, callback = Module(fail_at=2), DropBPLightning(0.5)
    with pytest.raises(RuntimeError, match="on fire"):
        fit(tmp_path, module, callback, STEPS)
    assert callback.handle is None
    assert not any("forward" in part.__dict__ for part in module.model.modules())


def test_an_unknown_submodule_is_refused_with_a_list_of_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(dropbp.ConfigError, match="'net' is not in Module; its submodules are model"):
        fit(tmp_path, Module(), DropBPLightning(0.5, module="net"), 1)
