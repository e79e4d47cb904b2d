"""The common set-up for measuring speed, memory and sequence length: batch, optimizer, and the variants of a step.

All variants of a run share the same parameters: a variant is a second tree of modules over them, with DropBP enabled or
not. So variants can take turns in one process, each through the same code path as a user's, at no cost in memory.

Shapes: B micro-batch, S sequence, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import dropbp
from dropbp.device import Device

from .models import decoder_layers
from .presets import MODELS, TINY_MODEL, chosen
from .reference_detach import DetachedBranches

SAMPLERS = ("exact", "nested")  # a random set of branches, as in the paper; the top to a random depth, the default
LEARNING_RATE = {"full": 2e-5, "lora": 1e-4, "qlora": 1e-4}
WEIGHT_DECAY = {"full": 0.02, "lora": 0.01, "qlora": 0.01}


@dataclass(frozen=True)
class Variant:
    """How a step is done: `plain`, with DropBP and a mask sampler (`exact`, `nested`), or `detach`.

    `detach` is the reference implementation's way, with the masks of `exact`.
    """

    how: str = "plain"
    drop_rate: float = 0.0

    @property
    def name(self) -> str:
        """The name in result files."""
        return self.how if self.how == "plain" else f"{self.how}-{self.drop_rate:g}"


PLAIN = Variant()


def build_optimizer(model: nn.Module, tuning: str) -> torch.optim.Optimizer:
    """AdamW with the paper's settings, fused where PyTorch has a fused kernel."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind = parameters[0].device.type
    options: dict[str, Any] = {"fused": True} if kind in ("cpu", "cuda") else {"foreach": False}
    # A rate of 0 would do as much work; a small one keeps random weights finite in runs of any length.
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE[tuning] / 100, weight_decay=WEIGHT_DECAY[tuning], **options)


def describe_optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Its name, and the dtype of its states, which is that of the parameters: bf16 takes half the bytes of float32."""
    dtypes = {str(p.dtype).removeprefix("torch.") for group in optimizer.param_groups for p in group["params"]}
    fused = ", fused" if optimizer.defaults.get("fused") else ""
    return f"{type(optimizer).__name__}{fused}, states in {' and '.join(sorted(dtypes))}"


def build_batch(model: str, batch_size: int, sequence_length: int, device: str) -> Tensor:
    """Random tokens, shape (B, S)."""
    size = (batch_size, sequence_length)
    if device == "meta":
        return torch.zeros(size, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(chosen("model", MODELS, model).vocabulary, size, generator=generator).to(device)


def loss_of(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """Run one forward and return the loss."""
    loss: Tensor = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    return loss


def twin(model: nn.Module) -> nn.Module:
    """A second tree of modules over the same parameters and buffers."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


class Lane:
    """One variant that can run: its own tree of modules, over the parameters that all variants share."""

    def __init__(
        self,
        variant: Variant,
        model: nn.Module,
        device: Device,
        compiled: bool = False,
        seed: int = 0,
        backend: str = "inductor",
    ) -> None:
        self.variant, self.seed = variant, seed
        self.model = model if variant.how == "plain" else twin(model)
        self.handle = self._enabled(device)
        if compiled:
            for layer in decoder_layers(self.model):
                layer.compile(backend=backend)

    def _enabled(self, device: Device) -> dropbp.Handle | DetachedBranches | None:
        if self.variant.how == "plain":
            return None
        if self.variant.how == "detach":
            return DetachedBranches(self.model, self.variant.drop_rate, self.seed)
        return dropbp.enable(self.model, self.variant.drop_rate, device=device, masks=self.variant.how, seed=self.seed)

    @contextmanager
    def masked(self, mask: Sequence[bool] | None) -> Iterator[None]:
        """Steps inside the context use this mask; None draws one."""
        fixed = (
            self.handle.fixed(mask) if mask is not None and isinstance(self.handle, dropbp.Handle) else nullcontext()
        )
        with fixed:
            yield

    def peak_memory_masks(self, count: int) -> list[tuple[bool, ...] | None]:
        """Masks that include the one with the highest peak memory; None stands for a drawn one.

        `exact` masks are much alike, so `count` are drawn. `nested` ones range from nothing dropped, where blocks
        beyond the budget are checkpointed, to nearly everything. The first of these is taken, and the one that just
        keeps the budget.
        """
        if not isinstance(self.handle, dropbp.Handle):
            return [None]
        if self.variant.how != "nested":
            return [None] * count
        flops = [branch.flops for branch in self.handle.branches]
        budget = (1 - self.variant.drop_rate) * sum(flops)
        within = tuple(sum(flops[i:]) > budget for i in range(len(flops)))
        return [(False,) * len(flops), within]

    @property
    def mask(self) -> str | None:
        """The latest mask, one digit for each branch, 1 = dropped."""
        mask = None if self.handle is None else self.handle.mask
        return None if mask is None else "".join("1" if dropped else "0" for dropped in mask)

    @property
    def dropped_share(self) -> float | None:
        """Share of the branches' FLOPs that the latest mask dropped."""
        if self.handle is None or self.handle.mask is None:
            return None
        flops = [branch.flops for branch in self.handle.branches]
        return sum(f for f, dropped in zip(flops, self.handle.mask, strict=True) if dropped) / sum(flops)


def compiler_of(model: str) -> str:
    """The backend of `torch.compile` for a model of that name."""
    return "eager" if model == TINY_MODEL else "inductor"


@contextmanager
def many_compilations() -> Iterator[None]:
    """Raise the recompilation limit of `torch.compile`, beyond which it would silently run layers uncompiled."""
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=512, accumulated_recompile_limit=4096):
        yield
