"""A batch of the trainer's own data, where a model cannot say what it takes; the run itself stays as it would be."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BigBirdConfig,
    BigBirdForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dropbp.errors import DiscoveryError
from dropbp.integrations.batches import first_batch
from dropbp.integrations.transformers import DropBPCallback

SMALL = {"vocab_size": 64, "d_model": 32, "num_labels": 2}
ROWS, LENGTH, LABELS = 24, 6, 2


class Own(nn.Module):
    """A model of one's own: it says nothing of what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(4))
        self.head = nn.Linear(16, LABELS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    ffn = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 32}
    return BartForSequenceClassification(BartConfig(**SMALL, **sizes, **ffn, eos_token_id=2))


def t5() -> nn.Module:
    sizes = {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForSequenceClassification(T5Config(**SMALL, **sizes, eos_token_id=2))


def clip() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


MODELS = {"own": Own, "bart": bart, "t5": t5, "clip": clip}


class Rows(Dataset[dict[str, Any]]):
    """Rows that draw from every random state there is, as augmentation does, and count how often they are asked."""

    def __init__(self, pictures: bool) -> None:
        self.pictures, self.asked, self.generator = pictures, 0, torch.Generator().manual_seed(0)
        self.numpys, self.own = np.random.default_rng(0), random.Random(0)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked += 1
        noise = torch.rand(1) + torch.rand(1, generator=self.generator) + random.random() + self.own.random()
        noise = noise + float(np.random.rand()) + float(self.numpys.random())  # noqa: NPY002
        token = 3 + int(float(noise) * 1e4) % 60
        ids = torch.tensor([token] * (LENGTH - 1) + [2])
        if self.pictures:
            return {"input_ids": ids, "pixel_values": torch.rand(3, 16, 16)}
        return {"input_ids": ids, "labels": torch.tensor(index % LABELS)}


class Stream(IterableDataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.rows, self.place = Rows(False), 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while self.place < ROWS:
            self.place += 1
            yield self.rows[self.place - 1]


class Collator:
    """It draws from a generator of its own, made when it is first needed, as those for masked language models do."""

    def __init__(self, pictures: bool) -> None:
        self.pictures = pictures
        self.generator: torch.Generator | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(1)
        batch = default_collate(rows)
        batch["input_ids"][:, 0] = int(torch.randint(3, 60, (1,), generator=self.generator))
        return {**batch, "return_loss": True} if self.pictures else dict(batch)


def make_trainer(name: str, folder: Path, callback: DropBPCallback, data: Any = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False, logging_steps=1, seed=3, **{"max_steps": 4, "save_strategy": "no", **options},
    )  # fmt: skip
    pictures = name == "clip"
    return Trainer(
        MODELS[name](), arguments, Collator(pictures), Rows(pictures) if data is None else data, callbacks=[callback]
    )


IMAGE, IMAGE_TOKENS = 63, 4


def llava() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, vision = LlamaConfig(**sizes, vocab_size=64), CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE, vision_feature_layer=-1)
    )


def _pictures_and_text() -> list[dict[str, Tensor]]:
    ids = torch.tensor([IMAGE] * IMAGE_TOKENS + list(range(5, 13)))
    return [{"input_ids": ids, "labels": ids, "pixel_values": torch.randn(3, 16, 16)} for _ in range(ROWS)]


@pytest.mark.parametrize("told", [False, True])
def test_branches_of_a_vision_tower_are_found_with_the_trainers_images(told: bool, tmp_path: Path) -> None:
    rows = _pictures_and_text()
    example = {"example_inputs": {name: value[None] for name, value in rows[0].items()}} if told else {}
    callback = DropBPCallback(0.5, **example)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True, max_steps=2,
        save_strategy="no",
    )  # fmt: skip
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert callback.handle is not None
            seen.update(callback.handle.report())

    Trainer(llava(), arguments, default_collate, rows, callbacks=[callback, Look()]).train()
    assert seen["not_recorded"] == ["model.vision_tower.post_layernorm"]  # LLaVA has it and never calls it
    assert sum("vision_tower" in branch["name"] for branch in seen["branches"]) == 4


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Trainer) -> list[Tensor]:
    return [parameter.detach() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_does_not_describe_its_inputs_trains_as_with_example_inputs(name: str, tmp_path: Path) -> None:
    batch = Collator(name == "clip")([Rows(name == "clip")[index] for index in range(2)])
    trainers = []
    for options in ({}, {"example_inputs": batch}):
        trainers.append(make_trainer(name, tmp_path, DropBPCallback(0.5, masks="exact", **options)))
        trainers[-1].train()  # the trainer seeds every random state when it is made
    found, given = trainers
    assert len(found.callback_handler.callbacks[0].report()["branches"]) >= 4
    assert losses(found) == losses(given)
    assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(given), strict=True))


@pytest.mark.parametrize("name", ["own", "t5"])
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    rows = [{"input_ids": torch.tensor([3 + i] * 5 + [2]), "labels": torch.tensor(i % LABELS)} for i in range(ROWS)]
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(name, tmp_path, DropBPCallback(0.5), rows, **saving)
    whole.data_collator = default_collate
    whole.train()
    again = make_trainer(name, tmp_path, DropBPCallback(0.5), rows, **saving)
    again.data_collator = default_collate
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


@pytest.mark.parametrize("data", [Rows(False), Stream()], ids=["rows", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
def test_taking_a_first_batch_does_not_change_the_loaders_next_batches(data: Dataset[Any], workers: int) -> None:
    def batches(takes_one: bool) -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        shuffled = {} if isinstance(data, IterableDataset) else {"shuffle": True}
        fresh: Any = type(data)(*([False] if isinstance(data, Rows) else []))
        loader = DataLoader(fresh, 4, collate_fn=Collator(False), num_workers=workers, **shuffled)
        if takes_one:
            assert first_batch(loader, nn.Identity())["input_ids"].shape == (2, LENGTH)
        return [batch["input_ids"] for batch in loader]

    plain, after = batches(False), batches(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, after, strict=True))


def test_a_loader_without_a_batch_is_reported_with_the_first_error(tmp_path: Path) -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield from ({"input_ids": torch.tensor([3, 2]), "labels": torch.tensor(0)} for _ in range(8))

    class OneShot(IterableDataset[dict[str, Any]]):
        def __init__(self) -> None:
            self.rows = stream()

        def __iter__(self) -> Iterator[dict[str, Any]]:
            return self.rows

    with pytest.raises(DiscoveryError, match=r"example_inputs=.* own data gave no batch to try either \(TypeError"):
        make_trainer("own", tmp_path, DropBPCallback(0.5), OneShot()).train()


def test_a_model_that_treats_short_rows_differently_is_enabled_with_rows_of_the_run(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    config = BigBirdConfig(vocab_size=64, max_position_embeddings=128, block_size=4, num_random_blocks=2, **sizes)
    model, length = BigBirdForSequenceClassification(config), 40  # up to 36 tokens BigBird changes to full attention
    rows = [{"input_ids": torch.randint(5, 64, (length,)), "labels": i % LABELS} for i in range(8)]
    callback = DropBPCallback(0.5)
    options = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True, report_to="none"
    )
    Trainer(model, options, train_dataset=rows, callbacks=[callback]).train()
    assert model.bert.attention_type == "block_sparse"
    assert callback.report()["forwards"] == 4 and callback.report()["realised_drop_rate"] > 0
