"""Models and tokenizers from a folder or from the Hub, with one-line errors for what users get wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dropbp.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear"}  # the paper's


def load_config(source: str) -> PretrainedConfig:
    """The configuration of a model: a Hub id, a folder, or a path of a `config.json`.

    Raises ConfigError if there is none, or it is of a kind that the installed transformers does not know.
    """
    from transformers import AutoConfig

    _refuse_missing_path(source)
    return _guarded(source, AutoConfig.from_pretrained)


def load_model(source: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model with its weights.

    Raises ConfigError if there is no such model, or it is none for causal language modelling.
    """
    from transformers import AutoModelForCausalLM

    _refuse_missing_path(source)
    return _guarded(source, AutoModelForCausalLM.from_pretrained, **{_dtype_argument(): dtype})


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; the end token pads where the tokenizer has none for padding.

    Raises ConfigError if there is none, or it has no end token.
    """
    from transformers import AutoTokenizer

    _refuse_missing_path(source)
    tokenizer: PreTrainedTokenizerBase = _guarded(source, AutoTokenizer.from_pretrained)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {source} has no end token; set eos_token in its tokenizer_config.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model of this configuration; under a `FakeTensorMode` it has shapes and no weights.

    Raises ConfigError if the installed transformers has no causal language model for it.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ConfigError(f"no causal language model for {type(config).__name__}: {_first_line(error)}") from error


def with_lora(model: Any, seed: int, *, adapters_in_fp32: bool = True, **options: Any) -> Any:
    """A causal language model with LoRA adapters, the paper's unless `options` of `peft.LoraConfig` say otherwise.

    The model itself is changed, and its own weights are frozen. `seed` is that of the adapters' first weights; the
    global random state stays. Without `adapters_in_fp32`, adapters of a model in 16 bits have 16 bits, too. Raises
    ConfigError if the adapters do not fit.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{**LORA, "task_type": "CAUSAL_LM", **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=adapters_in_fp32)
        except ValueError as error:
            raise ConfigError(f"LoRA does not fit {type(model).__name__}: {error}; train all weights.") from error


def _guarded(source: str, load: Any, **options: Any) -> Any:
    from safetensors import SafetensorError

    faults = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError, SafetensorError)
    try:
        return load(source, **options)
    except faults as error:
        logger.debug("loading %s failed", source, exc_info=True)
        raise ConfigError(f"{source} cannot be loaded: {_first_line(error)}") from error


def _refuse_missing_path(source: str) -> None:
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path and not Path(source).exists():
        raise ConfigError(f"{source} does not exist; pass a model folder or a Hub id.")


def _dtype_argument() -> str:
    from transformers import __version__

    major, minor = (int(part) for part in __version__.split(".")[:2])
    return "dtype" if (major, minor) >= (4, 56) else "torch_dtype"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
