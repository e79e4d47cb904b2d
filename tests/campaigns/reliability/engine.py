"""Faults inside a training step and inside a calibration: the next step is correct and nothing is left behind."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import dropbp
from dropbp.errors import StateError
from tests.common.engine_models import (
    assert_same_gradients,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
)

Loss = Callable[[nn.Module], Tensor]
ERRORS: tuple[type[BaseException], ...] = (torch.OutOfMemoryError, RuntimeError, MemoryError, KeyboardInterrupt)
KINDS = (None, "reentrant", "non-reentrant")
BRANCHES = 6


class FaultPoint(nn.Module):
    """An identity whose forward or backward raises when armed."""

    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] | None = None
        self.where = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and self.where == "forward":
            raise self.error("out of memory, as injected")
        return _Pass.apply(x, self)


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, point: FaultPoint) -> Tensor:
        ctx.point = point
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.point.error is not None and ctx.point.where == "backward":
            raise ctx.point.error("out of memory, as injected")
        return gradient, None


def net_with_fault_points(kind: str | None = None) -> tuple[nn.Module, list[FaultPoint]]:
    """Three blocks with a fault point in each branch, and one before the head."""
    model = plain_net(kind=kind)
    for block in model.blocks:
        block.mix.append(FaultPoint())
        block.mlp.append(FaultPoint())
    model.norm = nn.Sequential(model.norm, FaultPoint())
    return model, [module for module in model.modules() if isinstance(module, FaultPoint)]


def in_training(count: int, where: str) -> dict[str, Any]:
    """Errors in the forward or backward at a random place of a random step; the next step equals the paper's."""
    for number in range(count):
        random = Random(f"{where}:{number}")
        model, points = net_with_fault_points(random.choice(KINDS))
        plain, _ = net_with_fault_points()
        error, point = random.choice(ERRORS), random.choice(points)
        mask = _mask(random)
        with dropbp.enable(model, masks="exact", example_inputs=plain_batch(), seed=number) as handle:
            for _ in range(random.randrange(3)):
                plain_loss(model).backward()
            point.error, point.where = error, where
            _one_step(model, error)
            point.error = None
            _assert_next_step(handle, model, plain, mask)
        _assert_plain(model, plain)
    return {"injected": count}


def in_calibration(count: int) -> dict[str, Any]:
    """Errors in forward and backward of both methods; gradients, parameters, rates and random state are unchanged."""
    for number in range(count):
        random = Random(f"calibration:{number}")
        method = random.choice(("one-pass", "exact"))
        # The one-pass method refuses reentrant checkpoints other than those of transformers.
        model, points = net_with_fault_points(random.choice(KINDS if method == "exact" else (None, "non-reentrant")))
        plain, _ = net_with_fault_points()
        with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
            plain_loss(model).backward()
            before = _everything(model, handle)
            point = random.choice(points)
            point.error, point.where = random.choice(ERRORS), random.choice(("forward", "backward"))
            _expect(point.error, lambda h=handle, m=model, how=method: h.calibrate(lambda: plain_loss(m), method=how))
            point.error = None
            _assert_same(before, _everything(model, handle))
            _assert_next_step(handle, model, plain, _mask(random))
    return {"injected": count}


def in_the_loss(count: int) -> dict[str, Any]:
    """Exceptions in the user's own loss, also inside a calibration and inside `fixed`."""
    for number in range(count):
        random = Random(f"loss:{number}")
        model, plain = plain_net(kind=random.choice(KINDS)), plain_net()
        with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
            before = _everything(model, handle)
            if random.random() < 0.5:
                _expect(ZeroDivisionError, lambda h=handle, m=model: h.calibrate(lambda: plain_loss(m) / (1 // 0)))
                _assert_same(before, _everything(model, handle))
            else:
                _expect(ZeroDivisionError, lambda m=model: plain_loss(m) / (1 // 0))
            _assert_next_step(handle, model, plain, _mask(random))
    return {"injected": count}


def not_finite(count: int) -> dict[str, Any]:
    """NaN and infinite losses, parameters and inputs: calibration refuses and changes nothing; a step continues."""
    for number in range(count):
        random = Random(f"finite:{number}")
        model, plain = plain_net(), plain_net()
        bad = random.choice((math.nan, math.inf, -math.inf))
        with dropbp.enable(model, masks="exact", example_inputs=plain_batch()) as handle:
            plain_loss(model).backward()
            before = _everything(model, handle)
            closure = _bad_closure(model, bad, random.choice(("loss", "input", "gradient")))
            method = random.choice(("one-pass", "exact"))
            _expect(StateError, lambda h=handle, c=closure, how=method: h.calibrate(c, method=how))
            _assert_same(before, _everything(model, handle))
            (plain_loss(model) * bad).backward()
            _assert_next_step(handle, model, plain, _mask(random))
    return {"injected": count}


def full_disk(count: int, folder: Path) -> dict[str, Any]:
    """Writes that fail at a random byte: the previous file stays, and no other file is left behind."""
    import errno

    from dropbp.files import new_file

    path = folder / "dropbp.json"
    path.write_text("before", encoding="utf-8")
    for number in range(count):
        size = Random(number).randrange(100)

        def write(size: int = size) -> None:
            with new_file(path) as temporary:
                temporary.write_text("x" * size, encoding="utf-8")
                raise OSError(errno.ENOSPC, "No space left on device")

        _expect(OSError, write)
        assert path.read_text(encoding="utf-8") == "before"
        assert [file.name for file in folder.iterdir()] == [path.name]
    return {"injected": count}


def _bad_closure(model: nn.Module, bad: float, kind: str) -> Callable[[], Tensor]:
    if kind == "loss":
        return lambda: plain_loss(model) * bad
    if kind == "input":
        return lambda: plain_loss(model, torch.full_like(plain_batch(), bad))
    return lambda: (plain_loss(model) - plain_loss(model).detach()).abs().sqrt()  # 0, with the gradient 0 / 0


def _mask(random: Random) -> tuple[bool, ...]:
    return tuple(random.random() < 0.5 for _ in range(BRANCHES))


def _one_step(model: nn.Module, error: type[BaseException]) -> None:
    """Raises the error, or misses it: a dropped branch has no backward."""
    with contextlib.suppress(error):
        plain_loss(model).backward()
    model.zero_grad()


def _expect(error: type[BaseException], call: Callable[[], Any]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__} was raised")


def _assert_next_step(handle: dropbp.Handle, model: nn.Module, plain: nn.Module, mask: tuple[bool, ...]) -> None:
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()
    names = [branch.name for branch in handle.branches]
    with handle.fixed(mask):
        got = take_gradients(model, plain_loss(model))
    assert_same_gradients(got, paper_gradients(plain, names, mask, plain_loss))
    model.zero_grad()


def _assert_plain(model: nn.Module, plain: nn.Module) -> None:
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert_same_gradients(take_gradients(model, plain_loss(model)), take_gradients(plain, plain_loss(plain)))


def _everything(model: nn.Module, handle: dropbp.Handle) -> list[Any]:
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    parameters = [parameter.detach().clone() for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    return [*gradients, *parameters, torch.get_rng_state(), handle.state_dict(), modes]


def _assert_same(before: list[Any], after: list[Any]) -> None:
    for one, two in zip(before, after, strict=True):
        same = torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else one == two
        assert same, (one, two)
