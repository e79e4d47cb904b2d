"""Logits only where a label is: the same loss and gradients, in every way a model is called; refused elsewhere."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import dropbp
from dropbp.errors import ConfigError, StateError
from dropbp.integrations.transformers import DropBPCallback
from tests.common.tiny import make_model
from tests.test_callback import make_trainer

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
MORE = {"num_key_value_heads": 1, "intermediate_size": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": {**SIZES, **MORE},
    "Qwen2": {**SIZES, **MORE, "tie_word_embeddings": True},
    "GPT2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPT": {**SIZES, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "GPTNeoX": {**SIZES, "intermediate_size": 64, "max_position_embeddings": 64},
    "Gemma2": {**SIZES, **MORE, "head_dim": 16},
    "Cohere": {**SIZES, **MORE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    "Mixtral": {**SIZES, **MORE, **EXPERTS},
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch(*, left: bool = False, labelled: float = 0.2, rows: int = 3, length: int = 20) -> dict[str, Tensor]:
    """Rows with some labels, and padding without."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < labelled, ids, -100)
    labels[:, 7] = ids[:, 7]
    mask = torch.ones_like(ids)
    padding = slice(0, 4) if left else slice(length - 4, length)
    mask[0, padding], labels[0, padding] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def trained_on(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, gradients(model)


def assert_same(found: tuple[Any, dict[str, Tensor]], wanted: tuple[Any, dict[str, Tensor]]) -> None:
    assert found[0].loss.item() == pytest.approx(wanted[0].loss.item(), rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": torch.tensor(37)}, {"num_items_in_batch": 37}])
@pytest.mark.parametrize("left", [False, True])
def test_loss_and_gradients_are_the_same(name: str, more: dict[str, Any], left: bool) -> None:
    model, inputs = model_of(name), batch(left=left) | more
    whole = trained_on(model, **inputs)
    with dropbp.labelled_logits(model):
        found = trained_on(model, **inputs)
    assert_same(found, whole)
    kept = int((inputs["labels"][:, 1:] != -100).any(0).sum())
    assert found[0].logits.shape[1] == kept < whole[0].logits.shape[1]
    assert_same(trained_on(model, **inputs), whole)
    assert "forward" not in model.__dict__
    assert not [key for key in model.__dict__ if "dropbp" in key]


@pytest.mark.parametrize(
    "change",
    [
        lambda b: {"input_ids": b["input_ids"]},
        lambda b: {**b, "labels": None},
        lambda b: {**b, "labels": b["input_ids"]},  # every position
        lambda b: {**b, "labels": torch.full_like(b["labels"], -100)},  # none
        lambda b: {**b, "logits_to_keep": 0},
        lambda b: {**b, "shift_labels": torch.nn.functional.pad(b["labels"][:, 1:], (0, 1), value=-100)},
    ],
    ids=["no labels", "labels of None", "all labelled", "none labelled", "own positions", "own labels"],
)
def test_other_calls_are_left_alone(change: Any) -> None:
    model, inputs = model_of("Llama"), change(batch())
    whole = model(**inputs)
    with dropbp.labelled_logits(model):
        found = model(**inputs)
    assert torch.equal(found.logits, whole.logits)
    assert found.loss is whole.loss is None or torch.equal(found.loss.nan_to_num(7), whole.loss.nan_to_num(7))


def test_evaluation_computes_all_logits_unless_told() -> None:
    model, inputs = model_of("Llama"), batch()
    for evaluation in (False, True):
        with dropbp.labelled_logits(model, evaluation=evaluation):
            lengths = {model.eval()(**inputs).logits.shape[1]}
            with torch.no_grad():
                lengths.add(model.train()(**inputs).logits.shape[1])
        assert (lengths == {20}) is not evaluation


def test_labels_by_position_and_another_ignored_label_are_understood() -> None:
    model, inputs = model_of("GPT2"), batch()
    whole = model(**inputs).loss.item()
    with dropbp.labelled_logits(model):
        names = list(inspect.signature(model.forward).parameters)
        found = model(*map(inputs.get, names[: names.index("labels") + 1]))
        assert found.logits.shape[1] < 20
        assert found.loss.item() == pytest.approx(whole, rel=1e-5)
        other = {**inputs, "labels": inputs["labels"].masked_fill(inputs["labels"] == -100, 0), "ignore_index": 0}
        assert model(**other).loss.item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("tuner", ["lora", "prompt"])
def test_under_peft(tuner: str) -> None:
    import peft

    config = (
        peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        if tuner == "lora"
        else peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")  # labels and logits are longer
    )
    model, inputs = peft.get_peft_model(model_of("Llama"), config), batch()
    whole = trained_on(model, **inputs)
    with dropbp.labelled_logits(model):
        found = trained_on(model, **inputs)
    assert_same(found, whole)
    assert found[0].logits.shape[1] < whole[0].logits.shape[1]


@pytest.mark.parametrize("masks", ["nested", "exact"])
def test_as_an_option_of_enable(masks: str) -> None:
    model, inputs = model_of("Qwen2"), {**batch(), "use_cache": False}
    before = dict(model.__dict__)
    runs = []
    for logits in ("all", "labelled"):
        with dropbp.enable(model, 0.5, masks=masks, logits=logits, max_activations=None) as handle:
            runs.append([trained_on(model, **inputs) for _ in range(6)])
            assert handle.report()["forwards"] == 6
        assert model.__dict__.keys() == before.keys()
    for whole, found in zip(*runs, strict=True):
        assert_same(found, whole)
        assert found[0].logits.shape[1] < whole[0].logits.shape[1]


@pytest.mark.parametrize("first", [True, False])
def test_beside_enable_in_either_order(first: bool) -> None:
    model, inputs = model_of("Llama"), {**batch(), "use_cache": False}
    mask = [True] * 3 + [False] * 3
    with dropbp.enable(model, 0.5) as handle, handle.fixed(mask):
        whole = trained_on(model, **inputs)
    labelled = dropbp.labelled_logits(model) if first else None
    handle = dropbp.enable(model, 0.5)
    labelled = labelled or dropbp.labelled_logits(model)
    with handle.fixed(mask):
        found = trained_on(model, **inputs)
    assert_same(found, whole)
    assert found[0].logits.shape[1] < 20
    for patch in (handle, labelled) if first else (labelled, handle):
        patch.remove()
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 2}])
def test_in_a_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    """With label smoothing the trainer takes the labels itself, so all logits are computed."""
    logs = []
    for number, logits in enumerate(("all", "labelled")):
        callback = DropBPCallback(0.5, logits=logits)
        trainer = make_trainer(tmp_path / str(number), [callback], save_strategy="no", eval_strategy="epoch", **options)
        for row in trainer.train_dataset:
            row["labels"] = [-100] * 8 + row["labels"][8:]
        trainer.train()
        logs.append([log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log])
    for whole, found in zip(*logs, strict=True):
        key = "loss" if "loss" in whole else "eval_loss"
        assert found[key] == pytest.approx(whole[key], rel=1e-4)


def test_copies_compute_all_logits() -> None:
    model, inputs = model_of("Llama"), batch()
    with dropbp.labelled_logits(model):
        twin = copy.deepcopy(model)
        assert twin(**inputs).logits.shape[1] == 20
        assert model(**inputs).logits.shape[1] < 20


def test_twice_is_refused() -> None:
    model = model_of("Llama")
    with dropbp.labelled_logits(model), pytest.raises(StateError, match="already"):
        dropbp.labelled_logits(model)
    with dropbp.labelled_logits(model):
        pass


class OwnLoss(nn.Module):
    """Takes both arguments and computes its loss by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> Tensor:
        logits = self.inner(input_ids).logits
        return nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])


def unshifted() -> Any:
    config = transformers.BartConfig(
        vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64
    )
    return transformers.BartForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "no forward in it takes both labels and logits_to_keep"),
        (
            OwnLoss,
            "OwnLoss cannot compute logits only at labelled positions: its forward does not pass shift_labels on",
        ),
        (unshifted, "BartForCausalLM cannot compute logits only at labelled positions: its forward does not pass"),
    ],
)
def test_models_that_cannot_are_refused_and_left_as_they_were(make: Any, message: str) -> None:
    model = make()
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(ConfigError, match=message):
        dropbp.labelled_logits(model)
    assert [module.__dict__ for module in model.modules()] == before


def test_enable_refuses_likewise_and_leaves_no_trace() -> None:
    from tests.common.engine_models import plain_batch, plain_net

    model = plain_net()
    with pytest.raises(ConfigError, match="cannot compute logits only at labelled positions"):
        dropbp.enable(model, logits="labelled", example_inputs=plain_batch())
    assert not [key for module in model.modules() for key in module.__dict__ if "dropbp" in key or key == "forward"]
    with pytest.raises(ConfigError, match="logits is 'some'; allowed: all, labelled"):
        dropbp.enable(model, logits="some", example_inputs=plain_batch())
