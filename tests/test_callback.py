"""`DropBPCallback` in the Trainer of transformers and in TRL's."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from dropbp.cli.examples import collate
from dropbp.device import dynamo_graph_count
from dropbp.errors import ConfigError, StateError
from dropbp.integrations.replay import LossReplay
from dropbp.integrations.transformers import STATE_FILE, DropBPCallback
from tests.common.tiny import make_model, make_tokenizer, random_examples, save_model


class Watcher(TrainerCallback):
    """Notes the mask of every training forward and the logs, as a reporter would see them."""

    def __init__(self, callback: DropBPCallback, stop_at: int | None = None, fail_at: int | None = None) -> None:
        self.callback, self.stop_at, self.fail_at = callback, stop_at, fail_at
        self.masks: list[tuple[bool, ...] | None] = []
        self.logs: list[dict[str, float]] = []

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.masks.append(self.callback.handle.mask)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.masks.append(self.callback.handle.mask)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == self.fail_at:
            raise RuntimeError("the machine is on fire")
        control.should_training_stop = control.should_training_stop or state.global_step == self.stop_at

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.logs.append(dict(logs))


def make_trainer(
    folder: Path, callbacks: list[TrainerCallback], *, kind: type[Trainer] = Trainer, rows: int = 32, **options: Any
) -> Trainer:
    arguments = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 10,
        "logging_steps": 2,
        "save_steps": 4,
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        **options,
    }
    return kind(
        model=make_model(),
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=random_examples(rows),
        eval_dataset=random_examples(8, seed=1),
        data_collator=partial(collate, padding_id=0),
        callbacks=callbacks,
    )


def trained(
    folder: Path,
    callback: DropBPCallback,
    resume: str | None = None,
    watch: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trainer, Watcher]:
    watcher = Watcher(callback, **(watch or {}))
    trainer = make_trainer(folder, [watcher, callback], **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watcher


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_each_micro_batch_gets_a_mask_of_its_own(tmp_path: Path) -> None:
    callback = DropBPCallback(masks="exact", calibrate_at=None)
    _, watcher = trained(tmp_path, callback, gradient_accumulation_steps=2, max_steps=6)
    assert len(watcher.masks) == 12
    assert any(a != b for a, b in zip(watcher.masks[::2], watcher.masks[1::2], strict=True))


def test_resampling_per_step_keeps_one_mask_for_the_micro_batches_of_a_step(tmp_path: Path) -> None:
    callback = DropBPCallback(calibrate_at=None, resample="step")
    _, watcher = trained(tmp_path, callback, gradient_accumulation_steps=2, max_steps=6)
    assert watcher.masks[::2] == watcher.masks[1::2]
    assert len(set(watcher.masks)) > 1


class TwoForwards(Trainer):
    """R-Drop and its like."""

    def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
        return model(**inputs).loss + model(**inputs).loss


LONG = {"save_strategy": "no", "max_steps": -1}


@pytest.mark.parametrize(
    ("options", "kind", "rows"),
    [
        ({"max_steps": 50, "save_strategy": "no"}, Trainer, 32),
        ({**LONG, "num_train_epochs": 12, "gradient_accumulation_steps": 8}, Trainer, 36),
        ({**LONG, "num_train_epochs": 1, "gradient_accumulation_steps": 64}, Trainer, 200),
        ({"max_steps": 30, "save_strategy": "no"}, TwoForwards, 32),
        ({"max_steps": 60, "save_strategy": "no", "warmup_steps": 0}, Trainer, 32),
    ],
    ids=["plain", "short last accumulation", "one short step", "two forwards", "long"],
)
def test_the_budget_is_met_however_many_forwards_a_step_has(
    tmp_path: Path, options: dict[str, Any], kind: type[Trainer], rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    callback = DropBPCallback()
    make_trainer(tmp_path, [callback], kind=kind, rows=rows, **options).train()
    assert callback.report()["realised_drop_rate"] == pytest.approx(0.5, abs=0.02)
    assert "missed its budget" not in caplog.text


def test_a_run_stopped_early_warns_that_it_missed_its_budget(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = DropBPCallback()
    trained(tmp_path, callback, watch={"stop_at": 20}, max_steps=60, save_strategy="no")
    assert callback.report()["realised_drop_rate"] < 0.48
    assert caplog.text.count("DropBP missed its budget") == 1


@pytest.mark.parametrize("change", [{"drop_rate": 0.875}, {"gradient_accumulation_steps": 4}, {"max_steps": 60}])
def test_a_run_resumed_with_other_options_meets_its_budget(tmp_path: Path, change: dict[str, Any]) -> None:
    options = {"gradient_accumulation_steps": 2, "max_steps": 40, "save_steps": 20}
    trained(tmp_path, DropBPCallback(0.5), watch={"stop_at": 20}, **options)
    rate = change.get("drop_rate", 0.5)
    callback = DropBPCallback(rate)
    _, after = trained(
        tmp_path, callback, str(tmp_path / "checkpoint-20"), **{**options, **{k: change[k] for k in change if k in {
            "gradient_accumulation_steps", "max_steps"}}},
    )  # fmt: skip
    assert len(set(after.masks)) > 1
    done = callback.snapshot["handle"]["statistics"]
    whole = done["flops_dropped"] / done["flops_seen"]
    assert whole == pytest.approx(rate if rate == 0.5 else (0.42 + 0.875) / 2, abs=0.02 if rate == 0.5 else 0.05)


def test_an_optimizer_of_parameters_that_every_step_freezes_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [DropBPCallback()])
    embedding = trainer.model.get_input_embeddings().weight
    trainer.optimizer = torch.optim.AdamW([embedding], lr=1e-3)
    with pytest.raises(ConfigError, match=r"nothing would train.*stem='train'"):
        trainer.train()
    assert not any("forward" in module.__dict__ for module in trainer.model.modules())


@pytest.mark.parametrize(("masks", "drop_rate"), [("nested", 0.5), ("independent", 0.875)])
def test_every_step_gives_some_parameter_of_the_optimizer_a_gradient(
    tmp_path: Path, masks: str, drop_rate: float
) -> None:
    callback = DropBPCallback(drop_rate, masks=masks, calibrate_at=None, steps=None)
    trainer = make_trainer(tmp_path, [callback], max_steps=30, save_strategy="no")
    held = [p for n, p in trainer.model.named_parameters() if n.endswith(("q_proj.weight", "v_proj.weight"))]
    trainer.optimizer = torch.optim.AdamW(held, lr=1e-3)
    counts = []

    class Counter(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            counts.append(sum(parameter.grad is not None for parameter in held))

    trainer.add_callback(Counter())
    trainer.train()
    assert min(counts) > 0
    assert len(counts) == 30


def test_the_model_is_restored_at_the_end_of_training(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path / "a", DropBPCallback(calibrate_at=None), max_steps=2)
    bare = make_trainer(tmp_path / "b", [], max_steps=2)
    bare.train()
    for ours, theirs in zip(trainer.model.modules(), bare.model.modules(), strict=True):
        assert set(ours.__dict__) == set(theirs.__dict__)
        assert not ours._forward_hooks


def test_blocks_are_compiled_while_training_runs_and_not_after(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "a", DropBPCallback(), max_steps=4, logging_steps=1)
    counted = dynamo_graph_count()
    trainer, _ = trained(
        tmp_path / "b", DropBPCallback(compile_blocks={"backend": "eager"}), max_steps=4, logging_steps=1
    )
    assert dynamo_graph_count() > counted
    assert losses(trainer) == losses(whole)
    assert all(layer._compiled_call_impl is None for layer in trainer.model.model.layers)


def test_figures_are_in_the_trainers_log(tmp_path: Path) -> None:
    trainer, watcher = trained(tmp_path, DropBPCallback(calibrate_at=None))
    names = {"dropbp_realised_drop_rate", "dropbp_backward_saved_share", "dropbp_step_s", "dropbp_calibration_s"}
    seen = [logs for logs in watcher.logs if "loss" in logs]
    stored = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert len(seen) == len(stored) == 5
    assert all(names <= logs.keys() for logs in seen + stored)
    assert seen[-1]["dropbp_realised_drop_rate"] == pytest.approx(0.5, abs=0.06)


def test_logging_can_be_switched_off(tmp_path: Path) -> None:
    _, watcher = trained(tmp_path, DropBPCallback(calibrate_at=None, log=False), max_steps=2)
    assert not any(name.startswith("dropbp") for logs in watcher.logs for name in logs)


@pytest.mark.parametrize("masks", ["nested", "exact"])
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path: Path, masks: str) -> None:
    whole, watched = trained(tmp_path / "whole", DropBPCallback(masks=masks), gradient_accumulation_steps=2)
    _, before = trained(
        tmp_path / "cut", DropBPCallback(masks=masks), watch={"stop_at": 5}, gradient_accumulation_steps=2
    )
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    second, after = trained(tmp_path / "cut", DropBPCallback(masks=masks), checkpoint, gradient_accumulation_steps=2)
    assert watched.masks == before.masks[:8] + after.masks
    assert losses(whole) == losses(second)
    for ours, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_resumed_run_does_not_repeat_the_calibration(tmp_path: Path) -> None:
    callback = DropBPCallback(masks="exact", calibrate_at=0.2)
    trained(tmp_path, callback, watch={"stop_at": 5})
    assert callback.calibrated_steps == [2]
    resumed = DropBPCallback(masks="exact", calibrate_at=0.2)
    trained(tmp_path, resumed, str(tmp_path / "checkpoint-4"))
    assert resumed.calibrated_steps == [2]
    rates = [branch["rate"] for branch in resumed.report()["branches"]]
    assert len(set(rates)) > 1
    assert rates == [branch["rate"] for branch in callback.report()["branches"]]


def test_calibration_can_be_repeated(tmp_path: Path) -> None:
    callback = DropBPCallback(calibrate_at=2, recalibrate_every=0.3)
    trainer, _ = trained(tmp_path, callback)
    assert callback.calibrated_steps == [2, 5, 8]
    assert trainer.state.log_history[-1]["dropbp_calibration_s"] > 0


def test_calibration_does_not_change_data_order_or_random_state(tmp_path: Path) -> None:
    plain, _ = trained(tmp_path / "a", DropBPCallback(0.0, calibrate_at=None), max_steps=4)
    calibrated, _ = trained(tmp_path / "b", DropBPCallback(1e-9, calibrate_at=1, recalibrate_every=1), max_steps=4)
    assert losses(plain) == losses(calibrated)


def test_warm_up_steps_drop_nothing(tmp_path: Path) -> None:
    callback = DropBPCallback(calibrate_at=None, warmup_steps=3)
    _, watcher = trained(tmp_path, callback, gradient_accumulation_steps=2, max_steps=6)
    assert not any(any(mask) for mask in watcher.masks[:6])
    assert all(any(mask) for mask in watcher.masks[6:])


def test_checkpoints_hold_the_state_in_the_trainers_file_and_in_one_of_their_own(tmp_path: Path) -> None:
    trained(tmp_path, DropBPCallback(0.25, calibrate_at=None), max_steps=4)
    own = json.loads((tmp_path / "checkpoint-4" / STATE_FILE).read_text())
    trainers = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert own == trainers["stateful_callbacks"]["DropBPCallback"]
    assert own["args"]["drop_rate"] == 0.25
    assert own["attributes"]["snapshot"]["handle"]["statistics"]["forwards"] == 4


def test_a_plain_run_can_be_resumed_with_dropbp(tmp_path: Path) -> None:
    make_trainer(tmp_path, [], max_steps=4).train()
    callback = DropBPCallback(calibrate_at=None)
    trained(tmp_path, callback, str(tmp_path / "checkpoint-4"), max_steps=8)
    assert callback.report()["forwards"] == 4
    assert (tmp_path / "checkpoint-8" / STATE_FILE).is_file()


def test_the_trainer_can_restore_the_callback_itself(tmp_path: Path) -> None:
    trained(tmp_path, DropBPCallback(0.25, calibrate_at=None), max_steps=4)
    trainer = make_trainer(
        tmp_path, [DropBPCallback(calibrate_at=None)], max_steps=6, restore_callback_states_from_checkpoint=True
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    restored = next(other for other in trainer.callback_handler.callbacks if isinstance(other, DropBPCallback))
    assert restored.drop_rate == 0.25
    assert restored.report()["forwards"] == 6


def test_a_with_block_removes_dropbp_after_an_exception(tmp_path: Path) -> None:
    callback = DropBPCallback(calibrate_at=None)
    trainer = make_trainer(tmp_path, [callback, Watcher(callback, fail_at=2)])
    with pytest.raises(RuntimeError, match="on fire"), callback:
        trainer.train()
    assert callback.handle is None
    assert not any("forward" in module.__dict__ for module in trainer.model.modules())


def test_forwards_after_training_do_not_warn_of_a_missed_budget(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = DropBPCallback(calibrate_at=None)
    trainer, _ = trained(tmp_path, callback)
    caplog.clear()
    with callback.enabled(trainer.model.train()) as handle:
        batch = torch.ones(2, 8, dtype=torch.long)
        trainer.model(input_ids=batch, labels=batch).loss.backward()
        assert handle.report()["forwards"] == 1
    assert "budget" not in caplog.text


def test_training_again_after_an_exception_starts_from_the_first_step(tmp_path: Path) -> None:
    callback = DropBPCallback(calibrate_at=None)
    watcher = Watcher(callback, fail_at=2)
    trainer = make_trainer(tmp_path, [callback, watcher], max_steps=4)
    with pytest.raises(RuntimeError):
        trainer.train()
    watcher.fail_at = None
    trainer.train()
    assert callback.report()["forwards"] == 4


def test_plain_training_after_an_interrupted_run_updates_every_parameter(tmp_path: Path) -> None:
    callback = DropBPCallback(0.875)
    trainer = make_trainer(tmp_path, [callback, Watcher(callback, fail_at=2)])
    with pytest.raises(RuntimeError, match="on fire"):
        trainer.train()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    plain = make_trainer(tmp_path, [], max_steps=2)
    plain.model = plain.model_wrapped = trainer.model
    plain.train()
    assert not any(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())
    assert callback.handle is None


def test_another_callback_can_enable_a_model_after_an_interrupted_run(tmp_path: Path) -> None:
    callback, other = DropBPCallback(0.5), DropBPCallback(0.5)
    trainer = make_trainer(tmp_path, [callback, Watcher(callback, fail_at=2)])
    with pytest.raises(RuntimeError, match="on fire"):
        trainer.train()
    again = make_trainer(tmp_path, [other], max_steps=2)
    again.model = again.model_wrapped = trainer.model
    again.train()
    assert other.report()["forwards"] == 2


def test_evaluation_inside_training_equals_plain_evaluation(tmp_path: Path) -> None:
    callback = DropBPCallback(0.0, calibrate_at=None)
    plain, _ = trained(tmp_path / "a", callback, eval_strategy="steps", eval_steps=2, max_steps=2)
    bare = make_trainer(tmp_path / "b", [], eval_strategy="steps", eval_steps=2, max_steps=2)
    bare.train()
    assert plain.state.log_history[-2]["eval_loss"] == bare.state.log_history[-2]["eval_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resample": "epoch"}, "resample='epoch' is not known; allowed are 'forward' and 'step'"),
        ({"calibrate_at": 0}, "calibrate_at=0 must be above 0"),
        ({"recalibrate_every": -2}, "recalibrate_every=-2 must be above 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be 0 or more"),
    ],
)
def test_a_bad_schedule_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DropBPCallback(**options)
    assert message in str(caught.value)


def test_a_replayed_loss_has_the_gradients_of_a_loss_computed_outside_the_model() -> None:
    model = make_model().train()
    ids = torch.randint(1, 300, (2, 8))
    replay = LossReplay(model)
    output = model(input_ids=ids, labels=ids)
    loss = output.loss
    loss *= 3  # trainers scale in place
    (loss + output.logits.div_(2).logsumexp(-1).mean()).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    (closure,) = replay.closures()
    closure().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    replay.release()
    assert not model._forward_hooks


def test_a_replay_ignores_evaluation_and_raises_without_a_training_forward() -> None:
    model = make_model().train()
    replay = LossReplay(model)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(StateError, match="no training forward"):
        replay.closures()


def test_sft_trainer_takes_the_callback(tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    callback = DropBPCallback(calibrate_at=2)
    trainer = trl.SFTTrainer(
        model=make_model(),
        args=trl.SFTConfig(str(tmp_path), max_steps=4, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
        train_dataset=datasets.Dataset.from_list([{"text": f"Add {n} and 1 and say the sum."} for n in range(16)]),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.calibrated_steps == [2]
    assert callback.report()["realised_drop_rate"] == pytest.approx(0.5, abs=0.1)


def test_dpo_trainer_takes_the_callback(tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    callback = DropBPCallback(calibrate_at=2)
    rows = [{"prompt": f"Add {n} and 1.", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(16)]
    trainer = trl.DPOTrainer(
        model=str(save_model(tmp_path / "model")),
        args=trl.DPOConfig(str(tmp_path), max_steps=4, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.calibrated_steps == [2]
    assert callback.report()["forwards"] >= 4
