"""The models that the cells train: one small Llama, in full, with LoRA, or with LoRA over 4-bit weights."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from tests.common.tiny import make_model

TUNINGS = ("full", "LoRA", "QLoRA")
WIDTH, LAYERS = 64, 3


def build(tuning: str, task: str = "CAUSAL_LM") -> Any:
    """A model ready to train. For the task `SEQ_CLS` it returns a score from a head that is fully trained."""
    base = _base(tuning == "QLoRA", task)
    if tuning == "full":
        return base.train()
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        init_lora_weights="gaussian",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False).train()


def _base(quantised: bool, task: str) -> Any:
    """4-bit weights come from the loader in transformers, through bitsandbytes."""
    if task == "CAUSAL_LM" and not quantised:
        return make_model(LAYERS, WIDTH)
    options: dict[str, Any] = {"dtype": torch.float32}
    if quantised:
        options["quantization_config"] = _in_four_bits()
    if task == "CAUSAL_LM":
        return AutoModelForCausalLM.from_pretrained(Path(_saved().name), **options)
    torch.manual_seed(2)
    return AutoModelForSequenceClassification.from_pretrained(Path(_saved().name), num_labels=1, **options)


@functools.cache
def _saved() -> tempfile.TemporaryDirectory[str]:
    """One folder per rank: `save_pretrained` would write on the first rank only."""
    folder = tempfile.TemporaryDirectory()
    model = make_model(LAYERS, WIDTH)
    Path(folder.name, "config.json").write_text(model.config.to_json_string(), encoding="utf-8")
    save_model(model, str(Path(folder.name, "model.safetensors")), metadata={"format": "pt"})
    return folder


def _in_four_bits() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,  # FSDP shards parameters of a single dtype only
        llm_int8_skip_modules=["lm_head", "score"],
    )


def trained_values(model: nn.Module) -> dict[str, torch.Tensor]:
    """Complete copies of the trained parameters under any engine. A collective if they are sharded."""
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): _whole(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _whole(parameter: Any) -> torch.Tensor:
    if hasattr(parameter, "full_tensor"):
        return parameter.full_tensor().detach().clone()
    with _gathered(parameter):
        return parameter.detach().clone()


def _gathered(parameter: Any) -> Any:
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])
