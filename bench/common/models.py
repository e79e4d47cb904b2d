"""The measured models: Llama shapes with random weights, dense or quantised, and their loss.

Shapes: B micro-batch, S sequence, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dropbp.cli.models import with_lora
from dropbp.errors import ConfigError, MissingDependencyError

from .presets import MODELS, ModelShape, Training, chosen

if TYPE_CHECKING:
    from transformers import LlamaConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TUNINGS = ("full", "lora", "qlora")
LOSSES = ("plain", "chunked")
KERNELS = {"liger": "liger_kernel", "flash": "flash_attn"}  # allowed values of `kernels`, and the package of each
CHUNK_TOKENS = 1024
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # per weight: 4 bits, and the scale of each block of 64, itself quantised
INIT_STD = 0.02


def check_training(training: Training) -> None:
    """Raises ConfigError for an unknown value."""
    allowed = {"tuning": TUNINGS, "dtype": tuple(DTYPES), "loss": LOSSES}
    for field, values in allowed.items():
        value = getattr(training, field)
        if value not in values:
            raise ConfigError(f"{field} is {value!r}; allowed: {', '.join(values)}.")
    if training.kernels != "torch" and not set(training.kernels.split("+")) <= set(KERNELS):
        raise ConfigError(f"kernels is {training.kernels!r}; allowed: torch, or of {', '.join(KERNELS)} some with +.")


def check_packages(training: Training, device: str) -> None:
    """Raises MissingDependencyError, before a run begins, if a required package is not installed."""
    if training.tuning != "full":
        _package("peft", training.tuning)
    if training.tuning == "qlora" and device != "meta":
        _package("bitsandbytes", "qlora")
    for kernels in training.kernels.split("+"):
        if kernels in KERNELS:
            _package(KERNELS[kernels], f"kernels {kernels!r}")


def build_model(model: str, training: Training, device: str) -> nn.Module:
    """A causal language model with random weights on a device, ready for the given training.

    On the meta device, quantised weights are replaced by as many bytes (`PackedLinear`). Attention is the CPU kernel,
    whose memory grows linearly with the length, as on all current devices.

    Raises:
        ConfigError: the model or a setting is not known.
        MissingDependencyError: `lora` without peft, `qlora` without bitsandbytes.
    """
    check_training(training)
    shape = chosen("model", MODELS, model)
    with torch.random.fork_rng(devices=[]), _default_dtype(DTYPES[training.dtype]):
        torch.manual_seed(0)
        built = _quantised_model(shape, device) if training.tuning == "qlora" else _dense_model(shape, device)
        if training.tuning != "full":
            # the same model, with its linear layers replaced
            built = with_lora(built, 0, adapters_in_fp32=False).base_model.model
    if training.loss == "chunked":
        _use_chunked_loss(built)
    if "flash" in training.kernels:
        built.set_attn_implementation("flash_attention_2")
    if "liger" in training.kernels:
        _package("liger_kernel.transformers", "liger").apply_liger_kernel_to_llama(model=built)
    if training.checkpointing:
        built.gradient_checkpointing_enable({"use_reentrant": False})
    return built.train()  # type: ignore[no-any-return]


def decoder_layers(model: Any) -> nn.ModuleList:
    """The blocks of a model from `build_model`."""
    layers: nn.ModuleList = model.model.layers
    return layers


def _dense_model(shape: ModelShape, device: str) -> Any:
    from transformers import LlamaForCausalLM

    with torch.device(device):
        return LlamaForCausalLM(_llama_config(shape, device))


def _llama_config(shape: ModelShape, device: str) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=1 << 20,
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation=_counted_attention() if device == "meta" else "sdpa",
    )


def _quantised_model(shape: ModelShape, device: str) -> Any:
    """Build on meta and fill layer by layer, so the whole model in 16 bits need never fit."""
    model = _dense_model(shape, "meta")
    model.requires_grad_(False)
    if device == "meta":
        _replace_linear(model, lambda old: PackedLinear(old.in_features, old.out_features))
        return model
    model.config._attn_implementation = "sdpa"
    _replace_linear(model, lambda old: _four_bit(old, device))
    model.is_loaded_in_4bit = True
    return _filled(model, device)


def _replace_linear(model: Any, make: Any) -> None:
    for layer in decoder_layers(model):
        for name, module in list(layer.named_modules()):
            if type(module) is nn.Linear:
                layer.set_submodule(name, make(module))


def _four_bit(old: nn.Linear, device: str) -> nn.Module:
    bnb = _package("bitsandbytes", "qlora")
    new: nn.Module = bnb.nn.Linear4bit(
        old.in_features, old.out_features, bias=False, compute_dtype=old.weight.dtype, quant_type="nf4", device="meta"
    )
    weight = torch.empty(old.weight.shape, dtype=old.weight.dtype, device=device).normal_(std=INIT_STD)
    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return new


def _package(name: str, reason: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        known = name.replace("_", "-")
        raise MissingDependencyError(
            f"{reason} needs {name}, which is not installed; install it with: pip install {known}"
        ) from error


def _filled(model: Any, device: str) -> Any:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                value = torch.empty_like(parameter, device=device)
                value = value.normal_(std=INIT_STD) if value.dim() > 1 else value.fill_(1.0)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


class PackedLinear(nn.Linear):
    """A frozen linear layer with as many bytes as NF4 with double quantisation, for counting memory; it computes
    nothing.

    Like the layer of bitsandbytes, it unpacks its weight for the forward and again for the backward, and saves no
    activation.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False, device="meta")
        size = math.ceil(in_features * out_features * NF4_BYTES)
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Unpack and multiply."""
        shape = (self.out_features, self.in_features)
        return _PackedMatmul.apply(x_BSD, self.weight, shape)  # type: ignore[no-any-return]


class _PackedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return functional.linear(x_BSD, packed.new_empty(shape, dtype=x_BSD.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradient @ packed.new_empty(ctx.shape, dtype=gradient.dtype), None, None


def _counted_attention() -> str:
    """Attention for the meta device, which would otherwise use the kernel that keeps all S x S scores."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = "dropbp_counted"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _attention_of_cpu)
    return name


def _attention_of_cpu(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output = attend(query, key, value, 0.0, True, scale=scaling)[0]
    return output.transpose(1, 2).contiguous(), None


# -- loss


class HeadInLoss(nn.Module):
    """Replaces the head: passes hidden states on, and computes logits only inside the loss, a chunk of tokens at a
    time.
    """

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """The hidden states, which the loss receives in place of logits."""
        return hidden_BSD

    def loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        """Cross-entropy of the next token; logits are computed, used and freed chunk by chunk, twice."""
        hidden_TD = logits.flatten(0, 1)
        next_T = functional.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        total = hidden_TD.new_zeros((), dtype=torch.float32)
        for hidden, following in zip(hidden_TD.split(CHUNK_TOKENS), next_T.split(CHUNK_TOKENS), strict=True):
            total = total + checkpoint(
                _summed_loss, hidden, self.weight, following, use_reentrant=False, preserve_rng_state=False
            )
        return total / (labels.numel() - labels.shape[0])


def _summed_loss(hidden_TD: Tensor, weight_VD: Tensor, next_T: Tensor) -> Tensor:
    logits_TV = functional.linear(hidden_TD, weight_VD).float()
    return functional.cross_entropy(logits_TV, next_T, ignore_index=-100, reduction="sum")


def _use_chunked_loss(model: Any) -> None:
    model.lm_head = HeadInLoss(model.lm_head.weight)
    model.loss_function = model.lm_head.loss


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
