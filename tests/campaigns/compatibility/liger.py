"""Liger's patches on a small Llama.

`python -m tests.campaigns.compatibility.liger` uses its kernels, in Triton's interpreter.

Liger replaces the forward of single modules, and that of the model by one without logits. Its kernels need a GPU;
`TRITON_INTERPRET=1` runs some of them on a CPU: rotary embedding and the fused linear cross-entropy.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dropbp
from tests.common.engine_models import assert_same_gradients, detached, llama_loss, take_gradients, tiny_llama

MASK = (True, False, False, True)


def check(patch: Callable[[Any], Any]) -> None:
    """Branches of the patched model are found, its forward is unchanged, and gradients equal those of detached
    branches.
    """
    model, plain = tiny_llama(), tiny_llama()
    patch(model)
    patch(plain)
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]
    assert names == [f"model.layers.{layer}.{kind}" for layer in (0, 1) for kind in ("self_attn", "mlp")]
    with handle.fixed(MASK):
        loss = llama_loss(model)
        assert torch.equal(loss, llama_loss(plain))
        assert model(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).logits is None
        got = take_gradients(model, loss)
    with detached(plain, [name for name, dropped in zip(names, MASK, strict=True) if dropped]):
        expected = take_gradients(plain, llama_loss(plain))
    assert_same_gradients(got, expected)
    assert all(value > 0 for value in handle.calibrate(lambda: llama_loss(model)).sensitivities)


def stand_in(model: Any) -> None:
    """Patch a model like Liger, with PyTorch functions in place of its kernels."""
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(_swiglu, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = types.MethodType(_rms_norm, norm)
    model.forward = types.MethodType(_without_logits, model)


def _rms_norm(self: Any, x_BSD: Tensor) -> Tensor:
    return F.rms_norm(x_BSD, x_BSD.shape[-1:], self.weight, self.variance_epsilon)


class _SiluTimes(torch.autograd.Function):
    """`silu(a) * b` as one node that computes its own gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        share = torch.sigmoid(a)
        return gradients[0] * b * share * (1 + a * (1 - share)), gradients[0] * F.silu(a)


def _swiglu(self: Any, x_BSD: Tensor) -> Tensor:
    return self.down_proj(_SiluTimes.apply(self.gate_proj(x_BSD), self.up_proj(x_BSD)))


class _FusedLoss(torch.autograd.Function):
    """Linear layer and cross-entropy in one node, whose gradients are ready at the end of the forward."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        with torch.enable_grad():
            x_ND, weight_VD = x_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
            loss = F.cross_entropy(F.linear(x_ND, weight_VD), labels_N)
        ctx.save_for_backward(*torch.autograd.grad(loss, (x_ND, weight_VD)))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        by_x_ND, by_weight_VD = ctx.saved_tensors
        return gradients[0] * by_x_ND, gradients[0] * by_weight_VD, None


def _without_logits(self: Any, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    x_BSD = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    if labels is None:
        return CausalLMOutputWithPast(logits=self.lm_head(x_BSD))
    loss = _FusedLoss.apply(x_BSD[:, :-1].flatten(0, 1), self.lm_head.weight, labels[:, 1:].flatten())
    return CausalLMOutputWithPast(loss=loss)


def ligers_own(model: nn.Module) -> None:
    """Liger's own kernels, as far as Triton's interpreter can run them."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        model=model, rope=True, fused_linear_cross_entropy=True, rms_norm=False, swiglu=False, cross_entropy=False
    )


if __name__ == "__main__":
    check(ligers_own)
    sys.stdout.write("right\n")
