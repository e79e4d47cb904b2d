"""FLOPs of branches at any lengths, and what each weighs in the budget: the backward that it really has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import dropbp
from dropbp.discovery.backward_flops import BACKWARD
from dropbp.discovery.discover import find
from dropbp.flops import Shape, shape_of
from tests.campaigns.zoo.tiny import case
from tests.campaigns.zoo.training import backward_flops, counted_backward

ENCODER_DECODERS = (
    "T5ForConditionalGeneration",
    "BartForConditionalGeneration",
    "PegasusForConditionalGeneration",
    "M2M100ForConditionalGeneration",
)


def tiny(name: str) -> nn.Module:
    return case(name, "any").build()


def ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.arange(rows * length).reshape(rows, length) % 100 + 5


@pytest.mark.parametrize("name", ENCODER_DECODERS)
@pytest.mark.parametrize(("source", "target"), [(60, 5), (7, 50), (33, 33)])
def test_flops_of_an_encoder_decoder_follow_both_lengths(name: str, source: int, target: int) -> None:
    model = tiny(name)
    batch = {"input_ids": ids(source), "decoder_input_ids": ids(target), "use_cache": False}
    found = find(model, None, None)
    counted = dropbp.discover(model, batch)
    assert shape_of((), batch) == Shape(2, source, 0 if source == target else target)
    assert found.flops.at(shape_of((), batch)) == pytest.approx([branch.flops for branch in counted], rel=1e-6)


@pytest.mark.parametrize("name", [*ENCODER_DECODERS, "MarianMTModel"])  # Marian's decoder ends with its encoder
@pytest.mark.parametrize(("source", "target"), [(60, 5), (7, 50), (33, 33)])
def test_weights_of_an_encoder_decoder_follow_both_lengths(name: str, source: int, target: int) -> None:
    model = tiny(name)
    batch = {"input_ids": ids(source), "decoder_input_ids": ids(target), "use_cache": False}
    shape = shape_of((), batch)
    found, recorded = (find(model, given, None).weights.of_truncated_backward() for given in (None, batch))
    assert found.at(shape) == pytest.approx(recorded.at(shape), rel=1e-4)


def test_a_branch_that_pads_to_chunks_costs_the_same_for_each_chunk() -> None:
    model = tiny("LongT5ForConditionalGeneration")
    flops = find(model, None, None).flops
    for length in (16, 256, 512):
        batch = {"input_ids": ids(length), "decoder_input_ids": ids(length), "use_cache": False}
        counted = find(model, batch, None).structure.branches
        assert flops.at(shape_of((), batch)) == pytest.approx([branch.flops for branch in counted], rel=0.01), length


def test_labels_alone_tell_the_length_of_the_decoder() -> None:
    assert shape_of((), {"input_ids": ids(20), "labels": ids(6)}) == Shape(2, 20, 6)
    assert shape_of((), {"input_ids": ids(20), "labels": ids(20)}) == Shape(2, 20)
    assert shape_of((), {"input_ids": ids(20), "labels": torch.tensor([0, 1])}) == Shape(2, 20)
    assert shape_of((), {"inputs_embeds": torch.zeros(3, 9, 64), "labels": ids(9, 3)}) == Shape(3, 9)


def test_sound_and_images_are_counted() -> None:
    sound, image = torch.zeros(2, 80, 300), torch.zeros(2, 3, 8, 8)
    assert shape_of((), {"input_features": sound, "labels": ids(12)}) == Shape(2, 300, 12)
    assert shape_of((), {"input_values": torch.zeros(2, 4000)}) == Shape(2, 4000)
    assert shape_of((), {"input_ids": ids(20), "pixel_values": image}) == Shape(2, 20, 0, 3 * 8 * 8)
    assert shape_of((image,), {}) == Shape(2)


class TwoStreams(nn.Module):
    """A user's own model, whose arguments say nothing by their names: text under a picture's features."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(200, width)
        self.seen = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.read = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, picture: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        for layer in self.seen:
            picture = picture + layer(picture)
        stream = self.words(text) + picture.mean(dim=1, keepdim=True)
        for layer in self.read:
            stream = stream + layer(stream)
        return stream.sum()


@pytest.mark.parametrize("lengths", [(12, 40), (40, 12)])
def test_example_inputs_are_made_longer_to_tell_what_depends_on_which(lengths: tuple[int, int]) -> None:
    model, (picture, text) = TwoStreams(), lengths
    found = find(model, (torch.zeros(2, 8, 16), ids(5)), None)
    shape = shape_of((torch.zeros(2, picture, 16), ids(text)), {})
    per_token = 2 * 2 * 16 * 16
    assert found.flops.at(shape) == (per_token * picture, per_token * picture, per_token * text, per_token * text)


def test_an_image_beside_the_text_costs_the_same_at_any_length_of_the_text() -> None:
    model = llava()
    found = find(model, with_image(20), None)
    longer = with_image(50)
    expected = [branch.flops for branch in dropbp.discover(model, longer)]
    assert found.flops.at(shape_of((), longer)) == pytest.approx(expected, rel=1e-6)


def llava() -> nn.Module:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = transformers.LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=100)
    )


def with_image(length: int) -> dict[str, Any]:
    tokens = ids(length) % 90 + 5
    tokens[:, :16] = 100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(2, 3, 32, 32)}


def lower_half_frozen(model: Any) -> nn.Module:
    for module in (model.model.embed_tokens, *model.model.layers[:2]):
        module.requires_grad_(False)
    return model


def encoder_frozen(model: Any) -> nn.Module:
    model.get_encoder().requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    model.config.decoder_start_token_id = 0
    return model


def only_norms_trained(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


def lora(*layers: int) -> Callable[[Any], nn.Module]:
    def add(model: Any) -> nn.Module:
        targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
        return get_peft_model(model, LoraConfig(target_modules=targets, r=2, layers_to_transform=list(layers) or None))

    return add


WAYS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "everything": ("LlamaForCausalLM", lambda model: model),
    "upper half": ("LlamaForCausalLM", lower_half_frozen),
    "norms": ("LlamaForCausalLM", only_norms_trained),
    "LoRA": ("LlamaForCausalLM", lora()),
    "LoRA on the last layer": ("LlamaForCausalLM", lora(2)),
    "decoder of T5": ("T5ForConditionalGeneration", encoder_frozen),
    "everything, images": ("ViTForImageClassification", lambda model: model),
    "everything, experts": ("MixtralForCausalLM", lambda model: model),
}


def batch_for(model: Any) -> dict[str, torch.Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    labels = ids(9) if getattr(model.config, "is_encoder_decoder", False) else ids(24)
    return {"input_ids": ids(24), "labels": labels}


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_the_flops_of_the_backward_that_each_branch_really_has(way: str) -> None:
    """Counted under one mask after the other that a step may have: the lowest branches dropped, up to a border."""
    name, change = WAYS[way]
    model = change(tiny(name)).train()
    batch = batch_for(model)
    found = find(model, None, None)
    weights = found.weights.of_truncated_backward().at(shape_of((), batch))
    with dropbp.enable(model, 0.5, stem="rest", max_activations=None) as handle:
        outside, counted = backward_flops(handle, batch, [weight > 0 for weight in weights])
    counted[0] -= patches(model)
    if not outside:  # where nothing else is trained, the head's backward ends with the last branch
        counted[-1] -= 2 * 2 * 24 * model.config.hidden_size * model.config.vocab_size
    assert min(counted) >= 0 and sum(counted) > 0
    assert weights == pytest.approx([count / BACKWARD for count in counted], rel=0.01)
    assert sum(found.weights.at(shape_of((), batch))) == pytest.approx(sum(weights), rel=1e-3)


def patches(model: Any) -> int:
    """FLOPs of the gradient of a projection of patches, which is frozen with the first branch."""
    config = model.config
    return 2 * 2 * 16 * 3 * config.patch_size**2 * config.hidden_size if hasattr(config, "patch_size") else 0


@pytest.mark.parametrize("way", WAYS)
def test_dropping_a_branch_without_a_weight_saves_nothing(way: str) -> None:
    name, change = WAYS[way]
    model = change(tiny(name)).train()
    batch = batch_for(model)
    weights = find(model, None, None).weights.at(shape_of((), batch))
    idle = [weight == 0 for weight in weights]
    with dropbp.enable(model, 0.5, masks="exact", max_activations=None) as handle:
        whole, without_idle, least = (
            counted_backward(handle, batch, mask) for mask in ([False] * len(idle), idle, [True] * len(idle))
        )
    assert whole == without_idle > least


def test_a_branch_without_products_weighs_something_while_a_gradient_flows_through_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Scaled()
    found = find(model, torch.ones(2, 4), None)
    assert min(found.weights.at(found.shape)) > 0


def test_weights_follow_what_is_unfrozen_later() -> None:
    model = lower_half_frozen(tiny("LlamaForCausalLM"))
    weights = find(model, None, None).weights
    before = weights.at(Shape(1, 32))
    assert before[:4] == (0, 0, 0, 0) and not weights.refresh()
    model.model.layers[1].requires_grad_(True)
    assert weights.refresh()
    after = weights.at(Shape(1, 32))
    assert after[:2] == (0, 0) and min(after[2:]) > 0
    assert after[4:] == pytest.approx(tuple(before[4:]), rel=0.35)
