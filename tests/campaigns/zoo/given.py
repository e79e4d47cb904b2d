"""Inputs for models that take more than text: images and audio along with tokens."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from dropbp.inputs import Inputs

ROWS, WORDS, SIDE = 2, 12, 32
IMAGE_TOKEN, AUDIO_TOKEN = 100, 101
LIKELY = (16, 17, 4, 5, 1, 8, 9, 20, 32, 64)  # tokens that models make of one image of 32 by 32
MOST_TOKENS, DIFFERENT = 130, 3

Tensors = dict[str, torch.Tensor]


def inputs_for(model: Any, name: str) -> Inputs | None:
    """The inputs that a user would pass, for models whose inputs the library cannot make itself.

    Args:
        model: left unchanged.
        name: its class.
    """
    if name in INPUTS:
        return Inputs(kwargs=INPUTS[name](model))
    if "input_ids" not in _taken(model):
        return _sound_alone(model)
    return next(filter(None, (_with_words(model, kind, given) for kind, given in _beside_words(model))), None)


def _taken(model: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _beside_words(model: Any) -> Iterator[tuple[str, Tensors]]:
    """Inputs that may accompany the text, the most common form first."""
    taken = _taken(model)
    if "pixel_values" in taken:
        for given in _pictures(model, taken):
            yield "image", given
    if "input_features" in taken:
        for given in _sounds(model, taken):
            yield "audio", given


def _pictures(model: Any, taken: Iterable[str]) -> Iterator[Tensors]:
    vision = _part(model.config, "vision_config", "vision_tower_config", "vit_config")
    if "image_grid_thw" in taken:
        yield _patches_of_a_grid(vision)
    side = _number(vision, ("image_size",), SIDE)
    sizes = {"image_sizes": torch.tensor([[side, side]] * ROWS)}
    for more in (sizes, {}) if "image_sizes" in taken else ({},):
        yield {"pixel_values": _normal(ROWS, 3, side, side), **more}
        yield {"pixel_values": _normal(ROWS, 1, 3, side, side), **more}


def _patches_of_a_grid(vision: Any) -> Tensors:
    """One image per row, cut into patches, as the processors of Qwen models do."""
    merge, patch = _number(vision, ("spatial_merge_size",), 2), _number(vision, ("patch_size",), 8)
    frames = _number(vision, ("temporal_patch_size",), 1)
    channels = next(
        (int(getattr(vision, n)) for n in ("in_channels", "num_channels", "in_chans") if hasattr(vision, n)), 3
    )
    side = 2 * merge
    return {
        "pixel_values": _normal(ROWS * side * side, channels * frames * patch * patch),
        "image_grid_thw": torch.tensor([[1, side, side]] * ROWS),
    }


def _sounds(model: Any, taken: Iterable[str]) -> Iterator[Tensors]:
    audio = _part(model.config, "audio_config", "encoder_config")
    bins = _number(audio, ("num_mel_bins", "input_dim", "input_feat_size", "feature_size"), 80)
    longest = _number(audio, ("max_source_positions",), 64)
    for frames, width in itertools.product(dict.fromkeys((2 * longest, 128)), (bins, 2 * bins, 4 * bins)):
        names = ("input_features_mask", "feature_attention_mask")
        masks = {name: torch.ones(ROWS, frames, dtype=torch.long) for name in names if name in taken}
        yield {"input_features": _normal(ROWS, width, frames), **masks}
        yield {"input_features": _normal(ROWS, frames, width), **masks}


def _sound_alone(model: Any) -> Inputs | None:
    taken = _taken(model)
    if "input_features" not in taken:
        return None
    target = _target(model) if "decoder_input_ids" in taken else {}
    return next((Inputs(kwargs=each | target) for each in _sounds(model, taken) if _runs(model, each | target)), None)


def _runs(model: Any, inputs: Tensors) -> bool:
    try:
        _logits(model, inputs)
    except Exception:
        return False
    return True


def _part(config: Any, *names: str) -> Any:
    return next((part for part in (getattr(config, name, None) for name in names) if part is not None), config)


def _number(config: Any, names: Iterable[str], otherwise: int) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), otherwise)


def _with_words(model: Any, kind: str, given: Tensors) -> Inputs | None:
    """The input with text and as many placeholder tokens as the model needs.

    None if the model wants another form, or ignores the input.
    """
    errors: list[str] = []
    for count in dict.fromkeys((*LIKELY, *range(2, MOST_TOKENS))):
        inputs = _words(model, kind, count) | given
        try:
            _logits(model, inputs)
        except Exception as error:
            errors.append(str(error))
            if len(errors) == DIFFERENT and len(set(errors)) == 1:
                return None  # the number of tokens is not the problem
            continue
        return Inputs(kwargs=inputs) if _matters(model, inputs, next(iter(given))) else None
    return None


def _words(model: Any, kind: str, count: int) -> Tensors:
    names = (f"{kind}_token_id", f"{kind}_token_index", "media_token_id", "media_placeholder_token_id")
    token = next(
        (getattr(model.config, n) for n in names if isinstance(getattr(model.config, n, None), int)), IMAGE_TOKEN
    )
    words = torch.arange(5, 5 + ROWS * WORDS).reshape(ROWS, WORDS)
    ids = torch.cat([torch.full((ROWS, count), token), words], dim=1)
    kinds = {name: (ids == token).int() for name in ("mm_token_type_ids",) if name in _taken(model)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kinds}


def _logits(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = copy.deepcopy(model).eval()(**copy.copy(dict(inputs))).logits
    return logits


def _matters(model: Any, inputs: Tensors, name: str) -> bool:
    return not torch.equal(_logits(model, inputs), _logits(model, {**inputs, name: inputs[name] * -2}))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _text_alone(model: Any) -> Tensors:
    ids = torch.arange(5, 21).repeat(ROWS, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _patches(model: Any) -> dict[str, Any]:
    return {
        "pixel_values": _normal(ROWS, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _image_as_inputs(model: Any) -> Tensors:
    size = model.config.image_size
    return {"inputs": _normal(ROWS, 3, size, size)}


def _speech_and_text(model: Any) -> dict[str, Any]:
    sound = _normal(ROWS, model.config.audio_config.num_mel_bins, 128)
    return {"input_ids": torch.arange(5, 21).repeat(ROWS, 1), "input_features": sound, "num_delay_tokens": 4}


def _frames(model: Any) -> Tensors:
    names = ("feature_projection_input_dim", "input_feat_per_channel")
    bins = next(getattr(model.config, name) for name in names if hasattr(model.config, name))
    return {"input_features": _normal(ROWS, 64, bins)}


def _target(model: Any) -> Tensors:
    return {"decoder_input_ids": torch.arange(5, 5 + 16 * ROWS).reshape(ROWS, 16)}


def _frames_and_target(model: Any) -> Tensors:
    return _frames(model) | _target(model)


def _sound_and_target(model: Any) -> Tensors:
    return {"input_values": _normal(ROWS, 4000)} | _target(model)


def _text_and_codes(model: Any) -> Tensors:
    codes = torch.arange(5, 5 + ROWS * 8 * 9).reshape(ROWS, 8, 9)
    return {"input_ids": torch.arange(5, 21).repeat(ROWS, 1), "decoder_input_ids": codes}


def _codes(model: Any) -> Tensors:
    return {"input_ids": torch.arange(5, 5 + 16 * 3).reshape(1, 16, 3).repeat(ROWS, 1, 1) % 32}


def _text_with_end(model: Any) -> Tensors:
    given = _text_alone(model)
    given["input_ids"][:, -1] = model.config.eos_token_id
    return given


def _text_with_kinds(model: Any) -> Tensors:
    given = _text_alone(model)
    return given | {"mm_token_type_ids": torch.zeros_like(given["input_ids"])}


CLASSIFY_AT_THE_END = ("Bart", "BigBirdPegasus", "MBart", "MT5", "Mvp", "PLBart", "T5", "UMT5", "LED")

INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    **{f"{name}ForSequenceClassification": _text_with_end for name in CLASSIFY_AT_THE_END},
    "VoxtralRealtimeForConditionalGeneration": _speech_and_text,
    "Molmo2ForConditionalGeneration": _text_with_kinds,
    "ShieldGemma2ForImageClassification": _text_alone,
    "Siglip2ForImageClassification": _patches,
    "PerceiverForImageClassificationLearned": _image_as_inputs,
    "PerceiverForImageClassificationFourier": _image_as_inputs,
    "PerceiverForImageClassificationConvProcessing": _image_as_inputs,
    "SeamlessM4TForSpeechToText": _frames_and_target,
    "SeamlessM4Tv2ForSpeechToText": _frames_and_target,
    "Speech2TextForConditionalGeneration": _frames_and_target,
    "SpeechEncoderDecoderModel": _sound_and_target,
    "Wav2Vec2BertForCTC": _frames,
    "DiaForConditionalGeneration": _text_and_codes,
    "KyutaiSpeechToTextForConditionalGeneration": _codes,
}
