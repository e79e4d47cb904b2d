"""Small byte-level language models that train in seconds; the common base is kept in the user's cache.

The vocabulary is the 256 bytes, so head and embedding are small and the blocks, where DropBP saves, dominate, as in
large models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dropbp.cli.registry import cache_folder

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

VOCABULARY = 256
_FORMAT = 1  # raised whenever a cached base of an older version must not be used


def small_llama(layers: int, width: int, *, seed: int = 0, **options: Any) -> LlamaForCausalLM:
    """A Llama with random weights in training mode; the same for the same seed.

    `options` are of its configuration; by default it has four heads of attention and two of keys and values.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
        "vocab_size": VOCABULARY, "intermediate_size": 3 * width, "num_attention_heads": 4, "num_key_value_heads": 2,
        "use_cache": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    config = LlamaConfig(num_hidden_layers=layers, hidden_size=width, **(defaults | options))
    return _seeded(lambda: LlamaForCausalLM(config), seed)


def small_gpt2(layers: int, width: int, *, seed: int = 0, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A GPT-2 of the same kind: tied embeddings, biases and learned positions, which a Llama does not have."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_layer=layers, n_head=4, n_positions=128, use_cache=False,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return _seeded(lambda: GPT2LMHeadModel(config), seed)


def _seeded(make: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().train()


def train_briefly(
    model: Any,
    batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    progress: Callable[[int], None] = lambda step: None,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    warmup_share: float = 0.3,
) -> float:
    """Train the trainable parameters with AdamW and one cycle of the learning rate; returns the loss of the last step.

    Args:
        model: a causal language model in training mode.
        batch: returns token ids, shape (batch, sequence), a new batch per call.
        steps: optimizer steps.
        learning_rate: maximum of the cycle.
        progress: called before each step with its number, from 1.
        betas: betas of AdamW.
        warmup_share: share of the steps in which the learning rate rises.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=betas)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=warmup_share)
    loss = torch.zeros(())
    for step in range(steps):
        progress(step + 1)
        ids_BS = batch()
        loss = model(input_ids=ids_BS, labels=ids_BS).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return float(loss.detach())


# -- the base


@dataclass(frozen=True)
class Base:
    """A small Llama and its first training; equal ones share one cached copy."""

    layers: int = 8
    width: int = 192
    heads: int = 3
    sequence_length: int = 256
    batch_size: int = 4
    steps: int = 160
    learning_rate: float = 3e-3
    corpus_bytes: int = 2_000_000
    seed: int = 0


def new_model(base: Base) -> LlamaForCausalLM:
    """The base before any training."""
    return small_llama(
        base.layers, base.width, seed=base.seed, vocab_size=264, intermediate_size=8 * base.width // 3 // 32 * 32,
        num_attention_heads=base.heads, num_key_value_heads=base.heads, max_position_embeddings=base.sequence_length,
        eos_token_id=256, pad_token_id=256,
    )  # fmt: skip


def base_folder(base: Base, corpus_digest: str) -> Path:
    """The folder of the base that is trained in this way on this corpus."""
    key = json.dumps([_FORMAT, asdict(base), corpus_digest], sort_keys=True)
    return cache_folder() / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def cached_base(folder: Path, train: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
    """The base from the cache; a missing one is trained and stored atomically."""
    from transformers import LlamaForCausalLM

    if not (folder / "config.json").is_file():
        _store(train(), folder)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    return model


def _store(model: LlamaForCausalLM, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        model.save_pretrained(temporary)
        temporary.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # another process stored the same base first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
