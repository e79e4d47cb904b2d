"""Small models trained for some seconds on the standard library's sources: what sensitivities are measured on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dropbp.cli.corpus import source_code
from dropbp.cli.embedded import train_briefly

ROWS, LENGTH, VOCABULARY = 8, 32, 256


class Text:
    """Windows at random places of a text, as bytes: shape (rows, length)."""

    def __init__(self, seed: int = 0, max_bytes: int = 400_000) -> None:
        self.data = torch.frombuffer(bytearray(source_code(max_bytes).encode()), dtype=torch.uint8).long()
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, rows: int = ROWS, length: int = LENGTH) -> Tensor:
        starts = torch.randint(len(self.data) - length, (rows,), generator=self.generator).tolist()
        return torch.stack([self.data[start : start + length] for start in starts])


def llama(layers: int = 6, width: int = 40, seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


def gpt2(layers: int = 6, width: int = 40, seed: int = 0, dropout: float = 0.0) -> Any:
    """Tied embeddings, biases, learnt positions: what a Llama has not."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=4, n_positions=128, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def with_lora(model: Any, rank: int = 4, seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(model, config).train()


def train(model: Any, text: Text, steps: int, learning_rate: float = 3e-3) -> Any:
    train_briefly(model, text.batch, steps, learning_rate)
    return model


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss
