"""Small models for tests of sensitivities, trained for a few seconds on the sources of the standard library."""

from __future__ import annotations

from typing import Any

from dropbp.bench.common.corpus import Windows, source_code
from dropbp.bench.common.small import small_gpt2, small_llama, train_briefly
from torch import Tensor

from dropbp.cli import models


def text(seed: int = 0, rows: int = 8) -> Windows:
    return Windows(source_code(400_000), rows, 32, seed)


def llama(layers: int = 6, width: int = 40, seed: int = 0) -> Any:
    return small_llama(layers, width, seed=seed)


def gpt2(layers: int = 6, width: int = 40, seed: int = 0, dropout: float = 0.0) -> Any:
    """A GPT-2 with tied embeddings, biases and learned positions, which a Llama lacks."""
    return small_gpt2(layers, width, seed=seed, dropout=dropout)


def with_lora(model: Any, rank: int = 4, seed: int = 0) -> Any:
    return models.with_lora(model, seed, r=rank, lora_alpha=2 * rank, lora_dropout=0.0).train()


def train(model: Any, windows: Windows, steps: int, learning_rate: float = 3e-3) -> Any:
    train_briefly(model, windows.batch, steps, learning_rate)
    return model


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss
