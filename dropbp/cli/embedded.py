"""The embedded example: a small Llama over bytes, first trained on source code, kept in the user's cache.

It needs no download. Its vocabulary is the 256 bytes, so that head and embedding weigh little and the blocks, where
DropBP saves, weigh most, as they do in large models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_FORMAT = 1  # raised whenever a cached base of an older version must not be used


@dataclass(frozen=True)
class Base:
    """The small Llama and how it is first trained; two equal ones share one cached copy."""

    layers: int = 8
    width: int = 192
    heads: int = 3
    sequence_length: int = 256
    batch_size: int = 4
    steps: int = 160
    learning_rate: float = 3e-3
    corpus_bytes: int = 2_000_000
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """What the embedded example is made of."""

    base: Base = field(default_factory=Base)
    corpus_bytes: int = 1_000_000
    batch_size: int = 4
    steps: int = 90
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    seed: int = 0


def cache_folder() -> Path:
    """Where bases are kept: `$XDG_CACHE_HOME/dropbp`, or `~/.cache/dropbp`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dropbp"


def base_folder(base: Base, corpus_digest: str) -> Path:
    """The folder of the base that is made in this way from this corpus."""
    key = json.dumps([_FORMAT, asdict(base), corpus_digest], sort_keys=True)
    return cache_folder() / f"base-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def cached_base(folder: Path, train: Callable[[], LlamaForCausalLM]) -> LlamaForCausalLM:
    """The base from the cache; a missing one is trained and moved there at once."""
    from transformers import LlamaForCausalLM

    if not (folder / "config.json").is_file():
        _store(train(), folder)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder)
    return model


def new_model(base: Base) -> LlamaForCausalLM:
    """The small Llama before any training; the same weights for the same seed."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        return LlamaForCausalLM(_config(base))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, and `<|end|>` for the end of a text and for padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
    )


def train_briefly(
    model: Any,
    batch: Callable[[], Tensor],
    steps: int,
    learning_rate: float,
    progress: Callable[[int], None] = lambda step: None,
) -> float:
    """Train what is trainable by AdamW under one cycle of the learning rate; the loss of the last step.

    Args:
        model: a causal language model in training mode.
        batch: gives token ids, shape (batch, sequence), a new batch at each call.
        steps: optimizer steps.
        learning_rate: the largest of the cycle.
        progress: called with the number of each step, from 1, before it.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
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


def _config(base: Base) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=264,
        hidden_size=base.width,
        intermediate_size=8 * base.width // 3 // 32 * 32,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.heads,
        max_position_embeddings=base.sequence_length,
        eos_token_id=256,
        pad_token_id=256,
        bos_token_id=None,
        use_cache=False,
    )


def _store(model: LlamaForCausalLM, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        model.save_pretrained(temporary)
        byte_tokenizer().save_pretrained(temporary)
        temporary.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was quicker, with the same base
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
