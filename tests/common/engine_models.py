"""Small models for the tests of the engine, and the paper's algorithm on them: `x + f(x).detach()`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Shapes: B batch, S tokens, D width, V vocabulary.

VOCABULARY = 32


class Block(nn.Module):
    """Pre-norm block with two branches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.mix(self.norm1(x_BSD))
        return x_BSD + self.mlp(self.norm2(x_BSD))


class PlainNet(nn.Module):
    """A user's own model. `kind` is the kind of gradient checkpointing of its blocks, or None."""

    def __init__(self, blocks: int = 3, width: int = 8, kind: str | None = None) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, width)
        self.kind = kind
        self.in_evaluation_too = False

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.stem(x_BSD)
        for block in self.blocks:
            x_BSD = self._run(block, x_BSD)
        return self.head(self.norm(x_BSD))

    def _run(self, block: nn.Module, x_BSD: Tensor) -> Tensor:
        if self.kind is None or not (self.training or self.in_evaluation_too):
            return block(x_BSD)
        return checkpoint(block, x_BSD, use_reentrant=self.kind == "reentrant")


def plain_net(**options: Any) -> PlainNet:
    torch.manual_seed(1)
    return PlainNet(**options).train()


def plain_batch(seed: int = 2, width: int = 8) -> Tensor:
    return torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed))


def tiny_llama(layers: int = 2, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    options = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **{"use_cache": False, **options, **changes})
    return LlamaForCausalLM(config).train()


def tokens(seed: int = 2, rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def llama_loss(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    batch = tokens() if batch is None else batch
    return model(input_ids=batch, labels=batch).loss


def plain_loss(model: nn.Module, batch: Tensor | None = None) -> Tensor:
    return model(plain_batch() if batch is None else batch).square().mean()


def masks(branches: int) -> Iterator[tuple[bool, ...]]:
    return itertools.product((False, True), repeat=branches)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def take_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return gradients(model)


@contextlib.contextmanager
def detached(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The paper's way: detach the outputs of the named modules, `x + f(x).detach()`."""
    handles = [model.get_submodule(name).register_forward_hook(_detach) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _detach(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()


def paper_gradients(model: nn.Module, names: Sequence[str], mask: Sequence[bool], loss: Any) -> dict[str, Any]:
    """Gradients of a plain model with the masked ones of the named branches detached."""
    with detached(model, [name for name, dropped in zip(names, mask, strict=True) if dropped]):
        return take_gradients(model, loss(model))


def assert_same_gradients(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None, f"{name} has a gradient and should have none"
        else:
            assert got[name] is not None, f"{name} has no gradient"
            torch.testing.assert_close(
                got[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
            )
