"""Tiny models of every architecture: default configurations with reduced sizes and random weights."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from dropbp.inputs import Inputs
from tests.campaigns.zoo.given import AUDIO_TOKEN, IMAGE_TOKEN, inputs_for

FAMILIES = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "vision-language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "speech-ctc": "MODEL_FOR_CTC_MAPPING",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
}

WIDTH, HEADS, LAYERS, VOCABULARY = 32, 4, 3, 128
LARGEST = 20_000_000

DROP = object()

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH, "dim": WIDTH, "n_embed": WIDTH,
    "embedding_size": WIDTH, "emb_dim": WIDTH, "embed_dim": WIDTH, "embedding_dim": WIDTH, "model_dim": WIDTH,
    "word_embed_proj_dim": WIDTH, "hidden_dim": 64,
    "intermediate_size": 64, "n_inner": 64, "ffn_dim": 64, "d_ff": 64, "ffn_hidden_size": 64, "d_inner": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "shared_intermediate_size": 64, "feed_forward_proj_dim": 64,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS, "encoder_layers": LAYERS,
    "decoder_layers": LAYERS, "num_encoder_layers": LAYERS, "num_decoder_layers": LAYERS, "num_block_layers": LAYERS,
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2,
    "num_key_value_heads": 2, "num_kv_heads": 2, "multi_query_group_num": 2,
    "head_dim": 8, "d_kv": 8, "kv_channels": 8, "attention_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "qk_head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "attention_head_size": 8,
    "attention_hidden_size": WIDTH, "global_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "context_length": 128, "n_ctx": 128,
    "max_target_positions": 64, "max_source_positions": 32, "max_sequence_length": 128, "seq_length": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2,
    "state_size": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_heads": 8, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "mamba_headdim": 8, "mamba_ngroups": 1,
    "mamba_d_ssm": 64, "mamba_chunk_size": 8, "chunk_size": 8, "time_step_rank": 4, "mamba_dt_rank": 4,
    "mamba_expand": 2, "lru_width": WIDTH, "conv_L_cache": 3, "n_groups": 1,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 1,
    "image_size": 32, "patch_size": 8, "num_channels": 3, "type_vocab_size": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "sliding_window": 8, "attention_window_size": 8, "local_attention": 8, "attention_chunk_size": 16,
    "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "drop_path_rate": 0.0,
    "image_token_id": IMAGE_TOKEN, "image_token_index": IMAGE_TOKEN,
    "audio_token_id": AUDIO_TOKEN, "audio_token_index": AUDIO_TOKEN,
    "rotary_dim": 4, "laurel_rank": 8, "altup_num_inputs": 2, "num_memory_blocks": 4,
    "depth": LAYERS, "out_hidden_size": WIDTH, "projector_hidden_size": 64, "projection_hidden_size": 64,
}  # fmt: skip

LISTS = ("layer_types", "mlp_layer_types", "block_types", "layers_block_type", "attention_types", "no_rope_layers")
NESTED = ("text_config", "vision_config", "decoder", "encoder", "audio_config", "backbone_config", "qformer_config")


@dataclasses.dataclass(frozen=True)
class Case:
    """One architecture and how to build it. `build()` returns a model, or raises what the library raises."""

    family: str
    config_class: type
    model_class: type

    @property
    def name(self) -> str:
        return self.model_class.__name__

    def build(self, seed: int = 0) -> nn.Module:
        """Build the model on CPU in float32.

        Raises:
            Unbuildable: no way of shrinking the configuration gave a model; the message is the first error.
        """
        if self.name in UNAVAILABLE:
            raise Unbuildable(UNAVAILABLE[self.name])
        errors: list[Exception] = []
        for way in WAYS:
            torch.manual_seed(seed)
            try:
                config = way(self.config_class, self._special())
                if self.family == "classification":
                    _name_the_padding(config)
                self._check_size(config)
                return _with_live_weights(self.model_class(config))
            except Exception as error:
                errors.append(error)
        raise Unbuildable(" | ".join(dict.fromkeys(f"{type(e).__name__}: {_first_line(e)}" for e in errors)))

    def _special(self) -> dict[str, Any]:
        return SPECIAL.get(self.name) or SPECIAL.get(self.config_class.__name__, {})

    def inputs(self, model: Any) -> Inputs | None:
        """The inputs that a user would pass, for models whose inputs the library cannot make itself."""
        return inputs_for(model, self.name)

    def _check_size(self, config: Any) -> None:
        with torch.device("meta"):
            count = sum(p.numel() for p in self.model_class(copy.deepcopy(config)).parameters())
        if count > LARGEST:
            raise Unbuildable(f"{count:,} parameters, more than {LARGEST:,}")


class Unbuildable(Exception):
    """No tiny model of this class could be built; neither the library nor the model is at fault."""


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200]


def by_arguments(config_class: Any, special: Mapping[str, Any]) -> Any:
    """Pass sizes as arguments, so the configuration computes its derived values."""
    defaults = config_class()
    return config_class(**_merged(_sizes_for(defaults), special))


def by_attributes(config_class: Any, special: Mapping[str, Any]) -> Any:
    """Set sizes on a default configuration, including sub-configurations."""
    return shrink(config_class(**special))


def by_special(config_class: Any, special: Mapping[str, Any]) -> Any:
    """Use only the special values below for this configuration."""
    if not special:
        raise Unbuildable("nothing special is known")
    return config_class(**special)


def every_part_by_arguments(config_class: Any, special: Mapping[str, Any]) -> Any:
    """Like `by_arguments`, for sub-configurations of any name."""
    defaults = config_class()
    return config_class(**_merged(_sizes_for(defaults, _parts), special))


def every_part_by_attributes(config_class: Any, special: Mapping[str, Any]) -> Any:
    """Like `by_attributes`, for sub-configurations of any name."""
    return shrink(config_class(**special), _parts)


WAYS = (by_arguments, by_attributes, by_special, every_part_by_arguments, every_part_by_attributes)


def _usual_parts(config: Any) -> Iterable[str]:
    return NESTED


def _parts(config: Any) -> Iterable[str]:
    return [name for name, value in vars(config).items() if hasattr(value, "to_dict")]


def _sizes_for(defaults: Any, parts: Callable[[Any], Iterable[str]] = _usual_parts) -> dict[str, Any]:
    sizes = {name: value for name, value in SIZES.items() if _takes(defaults, name)}
    for name in parts(defaults):
        nested = getattr(defaults, name, None)
        if hasattr(nested, "to_dict"):
            kind = {"model_type": nested.model_type} if nested.model_type else {}
            sizes[name] = {**kind, **_sizes_for(nested, parts)}
    return sizes


def _merged(sizes: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """`special` merged into `sizes`; DROP removes an entry."""
    merged = dict(sizes)
    for name, value in special.items():
        inner = merged.get(name)
        merged[name] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return {name: value for name, value in merged.items() if value is not DROP}


def _takes(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    return name in config.to_dict() or (name != "dropout" and hasattr(config, name))


def shrink(config: Any, parts: Callable[[Any], Iterable[str]] = _usual_parts) -> Any:
    """The configuration with sizes set on the object itself, including sub-configurations."""
    for name, value in SIZES.items():
        current = getattr(config, name, None)
        if isinstance(current, (int, float)) and not isinstance(current, bool):
            setattr(config, name, value)
    for name in LISTS:
        current = getattr(config, name, None)
        if isinstance(current, (list, tuple)):
            setattr(config, name, _mixed(list(current), LAYERS))
    for name in parts(config):
        if hasattr(getattr(config, name, None), "to_dict"):
            shrink(getattr(config, name), parts)
    return config


def _name_the_padding(config: Any) -> None:
    """Set the padding token, which classifying decoders need to find the last token of each row."""
    for part in (config, config.get_text_config()):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0


def _mixed(items: list[Any], count: int) -> list[Any]:
    """`count` entries that include each kind if there is room."""
    kinds = list(dict.fromkeys(items))
    return (kinds + items)[:count] if items else items


def _with_live_weights(model: nn.Module) -> nn.Module:
    """Replace parameters that start at zero, which would hide gradients, by small random numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter == 0).all():
                parameter.normal_(0, 0.02)
    return model.float()


# Special needs of some architectures beyond the common sizes: matching heads, layer kinds that must all occur.
LATENT = {"num_key_value_heads": HEADS, "head_dim": 8, "qk_rope_head_dim": 8}
SEAMLESS = {
    "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "speech_encoder_layerdrop": 0.0, "speech_encoder_layers": 2,
}  # fmt: skip
HYBRID_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
SHARED_LAYERS = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
STAGES = {
    "depths": [1, 2, 2, 1], "hidden_sizes": [8, 16, 24, WIDTH], "hidden_size": DROP, "num_layers": DROP,
    "num_hidden_layers": DROP,
}  # fmt: skip
CONVNEXT = {**STAGES, "num_stages": 4, "patch_size": 4, "image_size": 64}
PYRAMID = {
    "depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, WIDTH], "num_attention_heads": [1, 2, 2, 4],
    "hidden_size": DROP,
}  # fmt: skip
WINDOWS = {
    "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2, "image_size": 32, "patch_size": 4,
    "hidden_size": DROP,
}  # fmt: skip
GEMMA4 = {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
DECODER = {"decoder_layers": LAYERS, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
RECURRENT = {"num_hidden_layers": LAYERS, "layer_types": HYBRID_LAYERS}


def _rope_of_pictures(*sections: int) -> dict[str, Any]:
    """How the frequencies of a head are divided among time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}
    return {"text_config": {"rope_parameters": rope}}


UNAVAILABLE = {"MraForMaskedLM": "its attention is a CUDA kernel; without it the attention returns zeros"}
# Plain chains of convolutions: the right answer is that there is no residual branch.
WITHOUT_RESIDUAL = (
    "MobileNetV1ForImageClassification",
    "PPLCNetForImageClassification",
    "TextNetForImageClassification",
)

REFORMER = {
    "attn_layers": ["local", "lsh", "local", "lsh"],
    "axial_pos_shape": [8, 16],
    "axial_pos_embds_dim": [16, 16],
    "feed_forward_size": 64,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_buckets": 4,
    "hidden_dropout_prob": 0.0,
    "num_hashes": 1,
    "hash_seed": 0,
}

SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("AXK1Config", "AXK2Config", "DeepseekV2Config", "DeepseekV3Config", "DeepseekV32Config"), LATENT),
    **dict.fromkeys(("Glm4MoeLiteConfig", "GlmMoeDsaConfig", "MiniCPM3Config", "YoutuConfig"), LATENT),
    "LongcatFlashConfig": {**LATENT, "num_layers": LAYERS, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "Kimi_K25Config": {"text_config": LATENT},
    "Mistral4Config": {
        "num_key_value_heads": HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
    },
    "GraniteSpeech5CTCConfig": {"encoder_config": {"num_key_value_heads": HEADS}},
    "LayoutLMv3Config": {"hidden_size": 48, "coordinate_size": 8, "shape_size": 8, "intermediate_size": 64},
    "LiltConfig": {"hidden_size": 48, "intermediate_size": 64},
    **dict.fromkeys(("SeamlessM4TConfig", "SeamlessM4Tv2Config"), SEAMLESS),
    "KimiLinearConfig": {**LATENT, **RECURRENT, "linear_head_dim": 8, "linear_num_heads": 2},
    "Dots3NoteTextConfig": {
        **LATENT, "num_attention_heads": HEADS,
        "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"], "shared_experts_intermediate_size": 32,
        "per_layer_config": {"01": {"head_dim": 16}, "02": {"head_dim": 16}},
    },
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "GPTNeoConfig": {
        "attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": 4,
        "attention_layers": DROP,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 8},
    "GraniteMoeHybridConfig": {"layer_types": HYBRID_LAYERS},
    "ZambaConfig": {
        "num_hidden_layers": 4, "layers_block_type": SHARED_LAYERS, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "Zamba2Config": {
        "num_hidden_layers": 4, "layers_block_type": SHARED_LAYERS, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_headdim": 16,
        "num_mem_blocks": 1, "adapter_rank": 4,
    },
    "Gemma4TextConfig": GEMMA4,
    "Gemma4UnifiedTextConfig": GEMMA4,
    "Gemma4Config": {"text_config": GEMMA4},
    "Gemma4UnifiedConfig": {"text_config": GEMMA4},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "ReformerModelWithLMHead": {**REFORMER, "is_decoder": True},
    "ReformerForMaskedLM": REFORMER,
    "XmodConfig": {"languages": ["en_XX"], "default_language": "en_XX"},
    "BltConfig": {
        "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4],
        **{
            part: {
                "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
                "num_hidden_layers": 2, "vocab_size": 260, "hidden_size_global": 64, "head_dim": 8,
            }
            for part in ("patcher_config", "encoder_config", "decoder_config")
        },
        "global_config": {
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64,
            "num_hidden_layers": 2, "head_dim": 16,
        },
    },
    # masked language models
    "EsmcConfig": {"num_key_value_heads": HEADS},
    "FunnelConfig": {
        "block_sizes": [2, 2], "block_repeats": [1, 1], "d_head": 8, "num_hidden_layers": DROP, "num_blocks": DROP,
    },
    "BigBirdConfig": {"block_size": 2, "num_random_blocks": 1},  # rows of 16 are processed in blocks, like long ones
    "BigBirdPegasusConfig": {"block_size": 2, "num_random_blocks": 1},
    "LEDConfig": {"attention_window": [8, 8, 8]},
    "LongformerConfig": {"attention_window": [8, 8, 8]},
    "PegasusXConfig": {"block_size": 8, "num_global_tokens": 4},
    "PoolFormerConfig": {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, WIDTH], "hidden_size": DROP},
    "PvtConfig": PYRAMID, "PvtV2Config": {**PYRAMID, "image_size": 32},
    "HieraConfig": {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "image_size": [64, 64]},
    "FocalNetConfig": {"embed_dim": 8, "depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3]},
    "LukeConfig": {"entity_vocab_size": 16, "entity_emb_size": 16},
    "NeoMMEConfig": {"head_dim": 16},
    "PerceiverConfig": {
        "num_latents": 16, "d_latents": WIDTH, "num_self_attends_per_block": 2, "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1, "num_blocks": 2,
    },
    # encoders with decoders
    "ProphetNetConfig": {"num_hidden_layers": DROP},
    # vision
    "ConvNextConfig": CONVNEXT, "ConvNextV2Config": CONVNEXT,
    "SwinConfig": WINDOWS, "Swinv2Config": WINDOWS, "DonutSwinConfig": WINDOWS, "DinatConfig": WINDOWS,
    "SegformerConfig": {
        "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 2, 1],
        "decoder_hidden_size": 16, "hidden_size": DROP,
    },
    "LevitConfig": {
        "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 4, 6], "depths": [2, 2, 2], "key_dim": [8, 8, 8],
        "image_size": 64, "hidden_size": DROP,
    },
    "CvtConfig": {
        "embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3], "hidden_size": DROP, "image_size": 32,
        "drop_path_rate": [0.0, 0.0, 0.0], "num_channels": 3,
        "attention_drop_rate": [0.0, 0.0, 0.0], "drop_rate": [0.0, 0.0, 0.0],
    },
    "ResNetConfig": {**STAGES, "embedding_size": 8, "layer_type": "bottleneck"},
    "RegNetConfig": {**STAGES, "embedding_size": 8, "groups_width": 8},
    "BitConfig": {**STAGES, "embedding_size": 8, "num_groups": 4},
    "EfficientNetConfig": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64},
    "MobileViTV2Config": {"image_size": 64, "patch_size": 2, "width_multiplier": 0.25},
    "Siglip2Config": {"vision_config": {"num_patches": 16}},
    "EncoderDecoderConfig": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    # hybrids: one layer of each kind
    "BambaConfig": {"attn_layer_indices": [1]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "BailingHybridConfig": {**LATENT, "layer_group_size": 2},
    "Glm5NextConfig": {
        "text_config": {
            **LATENT, "index_kpool": 4, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 2,
        },
    },
    "HunYuanVLConfig": {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1, 1]}}},
    **dict.fromkeys(
        (
            "Qwen3NextConfig", "Qwen3_5TextConfig", "Qwen3_5MoeTextConfig", "Qwen4ExpTextConfig",
        ),
        RECURRENT,
    ),
    **{
        f"{name}Config": {"text_config": RECURRENT}
        for name in ("Qwen3_5", "Qwen3_5Moe", "Qwen4Exp", "MiniCPMV4_6", "MiniCPMV4_7", "MiniCPMOcr")
    },
    # vision and language
    "Gemma3Config": {"mm_tokens_per_image": 4}, "ShieldGemma2Config": {
        "yes_token_index": 7, "no_token_index": 8, "mm_tokens_per_image": 4,
    },
    "PaliGemmaConfig": {"projection_dim": WIDTH, "vision_config": {"projection_dim": WIDTH}},
    **dict.fromkeys(
        (
            "Qwen2VLConfig", "Qwen2_5_VLConfig", "Qwen2_5OmniThinkerConfig", "Glm4vConfig", "Glm46VConfig",
            "GlmOcrConfig", "PaddleOCRVLConfig",
        ),
        _rope_of_pictures(2, 1, 1),
    ),
    "Glm4vMoeConfig": _rope_of_pictures(1, 1, 0),
    "Ernie4_5_VLMoeConfig": _rope_of_pictures(1, 1, 2),
    # speech
    "MoonshineStreamingConfig": {"num_key_value_heads": HEADS},
    "KyutaiSpeechToTextConfig": {
        "codebook_vocab_size": 32, "num_codebooks": 2, "audio_pad_token_id": 4, "audio_bos_token_id": 5,
        "bos_token_id": 1,
    },
    "GraniteSpeechConfig": {"projector_config": {"encoder_hidden_size": 64}},
    "GraniteSpeechPlusConfig": {"projector_config": {"encoder_hidden_size": 64}},
    "DiaConfig": {
        "decoder_config": {
            "cross_num_attention_heads": HEADS, "cross_head_dim": 8, "cross_num_key_value_heads": HEADS,
            "cross_hidden_size": WIDTH, "num_channels": 9, "vocab_size": 1028,
        },
    },
}  # fmt: skip


def batches_to_train_on(model: Any, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Batches as in a training loop, the most realistic first: with labels, and for decoders with another length."""
    rows = next(iter(batch.values())).shape[0]
    classes = torch.arange(rows) % max(1, int(getattr(model.config, "num_labels", 2) or 2))
    if "labels" in inspect.signature(model.forward).parameters:
        alone = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
        if getattr(model.config, "is_encoder_decoder", False):
            yield {**alone, "labels": torch.arange(5, 5 + 7 * rows).reshape(rows, 7)}
        if "input_ids" in batch:
            yield {**batch, "labels": batch["input_ids"].clone()}
        yield {**batch, "labels": classes}
        yield {**batch, "labels": torch.nn.functional.one_hot(classes, max(2, model.config.num_labels)).float()}
        yield {**alone, "labels": torch.arange(5, 5 + 4 * rows).reshape(rows, 4)}
    yield dict(batch)


def case(name: str, family: str) -> Case:
    """One architecture by name, without importing all others."""
    model_class = getattr(transformers, name)
    return Case(family, model_class.config_class, model_class)


def cases(family: str) -> Iterator[Case]:
    """All architectures of a family, each model class once."""
    seen = set()
    mapping = getattr(modeling_auto, FAMILIES[family])
    for config_class, model_classes in mapping.items():
        for model_class in model_classes if isinstance(model_classes, tuple) else (model_classes,):
            if model_class not in seen:
                seen.add(model_class)
                yield Case(family, model_class.config_class or config_class, model_class)
