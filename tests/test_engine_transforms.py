"""Transforms, caches, kernels and left-overs: what surrounds a forward changes nothing of what a mask promises."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import dropbp
from dropbp._torch import kernel_depends_on_weight
from dropbp.errors import ConfigError
from tests.common.engine_models import (
    assert_same_gradients,
    llama_loss,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
    tokens,
)

MASK = (True, False, True, False, False, True)


class LayerScaled(nn.Module):
    """Branches with a parameter that the root multiplies in."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.bodies = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(6))
        self.scales = nn.ParameterList(nn.Parameter(torch.full((width,), 0.7)) for _ in range(6))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.stem(x_BSD)
        for body, scale in zip(self.bodies, self.scales, strict=True):
            x_BSD = x_BSD + scale * body(x_BSD)
        return x_BSD


def enabled(kind: str) -> tuple[nn.Module, dropbp.Handle]:
    torch.manual_seed(1)
    model: nn.Module = LayerScaled().train() if kind == "scoped" else plain_net()
    scaling = "unbiased" if kind == "scaled" else "none"
    masks = "independent" if kind == "scaled" else "exact"
    return model, dropbp.enable(model, 0.5, masks=masks, scaling=scaling, example_inputs=plain_batch())


def loss_by_row(model: nn.Module, parameters: dict[str, Tensor], x_BSD: Tensor) -> Tensor:
    return torch.func.functional_call(model, parameters, (x_BSD,)).square().mean((1, 2))


def transformed(way: str, model: nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the mean loss by one of the transforms."""
    x = plain_batch()
    if way == "grad":
        return torch.func.grad(lambda p: loss_by_row(model, p, x).mean())(own)
    if way == "vmap of grad":
        one = torch.func.grad(lambda p, row: loss_by_row(model, p, row[None]).mean())
        return {name: g.mean(0) for name, g in torch.func.vmap(one, in_dims=(None, 0))(own, x).items()}
    if way == "jacrev":
        return {n: g.mean(0) for n, g in torch.func.jacrev(lambda p: loss_by_row(model, p, x))(own).items()}
    other = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    loss_by_row(model, {name: p * 1.0 for name, p in other.items()}, x).mean().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in other.items()}


@pytest.mark.parametrize("way", ["grad", "vmap of grad", "jacrev", "other parameters"])
@pytest.mark.parametrize("kind", ["plain", "scaled", "scoped"])
@pytest.mark.parametrize("mask", [MASK, (True,) * 6])
def test_a_transform_gives_the_gradient_of_a_backward(way: str, kind: str, mask: tuple[bool, ...]) -> None:
    model, handle = enabled(kind)
    with handle.fixed(mask):
        expected = take_gradients(model, plain_loss(model))
        model.zero_grad()
        got = transformed(way, model, dict(model.named_parameters()))
    for name, gradient in expected.items():
        other = torch.zeros_like(got[name]) if gradient is None else gradient
        torch.testing.assert_close(got[name], other, rtol=1e-4, atol=1e-7)


class Shared(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.shared = nn.Linear(width, width), weight_norm(nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.stem(x_BSD)
        for norm in self.norms:
            x_BSD = x_BSD + self.shared(norm(x_BSD))
        return x_BSD


def test_a_dropped_call_leaves_nothing_in_the_cache_of_parametrizations() -> None:
    torch.manual_seed(0)
    model = Shared().train()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    with handle.fixed((True, False, False)):
        expected = take_gradients(model, plain_loss(model))
        with parametrize.cached():
            got = take_gradients(model, plain_loss(model))
    for name, gradient in expected.items():
        assert (got[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient)


class ViewBranch(nn.Module):
    def __init__(self, kind: type, width: int = 8) -> None:
        super().__init__()
        self.norm, self.body, self.kind = nn.LayerNorm(width), nn.Linear(width, width), kind

    def forward(self, x_BSD: Tensor) -> Any:
        view_BSD = self.body(self.norm(x_BSD)).flatten(0, 1).unflatten(0, x_BSD.shape[:2])
        return {Tensor: view_BSD, tuple: (view_BSD, None), dict: {0: view_BSD}}[self.kind]


class AddedInPlace(nn.Module):
    in_place = True

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(8, 8), nn.ModuleList(ViewBranch(kind) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.stem(x_BSD)
        for block in self.blocks:
            h_BSD = block(x_BSD) if block.kind is Tensor else block(x_BSD)[0]
            if self.in_place:
                h_BSD += x_BSD
            else:
                h_BSD = h_BSD + x_BSD
            x_BSD = h_BSD
        return x_BSD


@pytest.mark.parametrize("kind", [Tensor, tuple, dict])
def test_the_stream_may_be_added_in_place_to_a_view_that_a_dropped_branch_made(kind: type) -> None:
    torch.manual_seed(0)
    model = AddedInPlace(kind).train()
    model.in_place = False
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    with handle.fixed((True, False, True)):
        expected = take_gradients(model, plain_loss(model))
        model.in_place = True
        got = take_gradients(model, plain_loss(model))
    assert all((got[n] is None) == (g is None) and (g is None or torch.equal(got[n], g)) for n, g in expected.items())


class WrittenTo(nn.Module):
    """Blocks that write what they add into the stream."""

    def __init__(self, way: str, view: bool) -> None:
        super().__init__()
        self.write, self.view, self.stem = WAYS[way], view, nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.bodies = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        h_BSD = self.stem(x_BSD)
        h_BSD = h_BSD.transpose(0, 1).transpose(0, 1) if self.view else h_BSD * 1.0
        for norm, body in zip(self.norms, self.bodies, strict=True):
            h_BSD = self.write(h_BSD, lambda h, norm=norm, body=body: body(norm(h.clone())))
        return h_BSD


def by_statement(h_BSD: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    h_BSD += f(h_BSD)
    return h_BSD


def into_a_slice(h_BSD: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    h_BSD[:, 1:] += f(h_BSD[:, 1:])
    return h_BSD


def into_a_view(h_BSD: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    h_BSD.view(-1, 8).add_(f(h_BSD.view(-1, 8)))
    return h_BSD


def by_assignment(h_BSD: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    h_BSD[:, :] = h_BSD + f(h_BSD)
    return h_BSD


def out_of_place_slice(h_BSD: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat((h_BSD[:, :1], h_BSD[:, 1:] + f(h_BSD[:, 1:])), 1)


WAYS: dict[str, Any] = {
    "add_": lambda h, f: h.add_(f(h)),
    "statement": by_statement,
    "half": lambda h, f: h.add_(f(h), alpha=0.5),
    "sub_": lambda h, f: h.sub_(f(h), alpha=-1),
    "view": into_a_view,
    "slice": into_a_slice,
    "assignment": by_assignment,
}
OUT_OF_PLACE: dict[str, Any] = {
    "half": lambda h, f: h + 0.5 * f(h),
    "slice": out_of_place_slice,
}


@pytest.mark.parametrize("masks", ["exact", "nested"])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("way", list(WAYS))
def test_branches_written_into_the_stream_are_found_and_dropped_exactly(way: str, view: bool, masks: str) -> None:
    torch.manual_seed(0)
    model = WrittenTo(way, view).train()
    handle = dropbp.enable(model, 0.5, masks=masks, example_inputs=plain_batch())
    assert [branch.modules[-1] for branch in handle.branches] == [f"bodies.{i}" for i in range(3)]
    torch.manual_seed(0)
    plain = WrittenTo(way, view).train()
    plain.write = OUT_OF_PLACE.get(way, lambda h, f: h + f(h))
    handle.calibrate(lambda: plain_loss(model))
    for _ in range(6):
        got = take_gradients(model, plain_loss(model))
        dropped = [f"bodies.{i}" for i, drop in enumerate(handle.mask or ()) if drop]
        hooks = [plain.get_submodule(name).register_forward_hook(lambda *call: call[2].detach()) for name in dropped]
        expected = take_gradients(plain, plain_loss(plain))
        for hook in hooks:
            hook.remove()
        for name, gradient in expected.items():
            if not (name.startswith("stem") and masks == "nested"):
                assert (got[name] is None) == (gradient is None), name
                if gradient is not None:
                    torch.testing.assert_close(got[name], gradient)


class Kernels(nn.Module):
    """Modules that ask whether gradients are recorded, in evaluation mode under a root that trains."""

    def __init__(self, kind: str, width: int = 8) -> None:
        super().__init__()
        made = {
            "encoder": lambda: nn.TransformerEncoderLayer(width, 2, 16, batch_first=True),
            "attention": lambda: nn.MultiheadAttention(width, 2, batch_first=True),
            "lstm": lambda: nn.LSTM(width, width, batch_first=True),
            "gru": lambda: nn.GRU(width, width, batch_first=True),
        }
        self.kind, self.stem = kind, nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.bodies = nn.ModuleList(made[kind]().eval() for _ in range(3))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.stem(x_BSD)
        for norm, body in zip(self.norms, self.bodies, strict=True):
            h_BSD = norm(x_BSD)
            out: Any = body(h_BSD, h_BSD, h_BSD) if self.kind == "attention" else body(h_BSD)
            x_BSD = x_BSD + (out[0] if isinstance(out, tuple) else out)
        return x_BSD


@pytest.mark.parametrize("kind", ["encoder", "attention", "lstm", "gru"])
def test_a_kernel_chosen_by_grad_mode_is_that_of_the_recorded_run(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Kernels(kind), torch.randn(4, 16, 8)
    expected = model(x)
    named = [f"bodies.{i}" for i in range(3)] if kind == "encoder" else None
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=x, branches=named)
    for mask in [(True, True, True), (False, True, False)]:
        with handle.fixed(mask):
            out = model(x)
            assert torch.equal(out, expected)
        gradients = take_gradients(model, out.square().mean())
        for i, dropped in enumerate(mask):
            assert all((gradients[n] is None) == dropped for n in gradients if n.startswith(f"bodies.{i}."))


def to_zero(way: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Some leave the version of a gradient as it is."""
    if way == "optimizer":
        optimizer.zero_grad(set_to_none=False)
    elif way == "model":
        model.zero_grad(set_to_none=False)
    else:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.data.zero_()


@pytest.mark.parametrize("way", ["optimizer", "model", "data"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_gradients_set_to_zero_move_no_dropped_branch(accumulate: int, way: str, late: bool) -> None:
    model = plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    parts = [f"blocks.{i}.{part}" for i in range(3) for part in ("mix", "mlp")]
    for _ in range(12):
        dropped = [True] * len(parts)
        for micro_batch in range(accumulate):
            if not late and not micro_batch:
                to_zero(way, model, optimizer)
            loss = plain_loss(model)
            if late and not micro_batch:
                to_zero(way, model, optimizer)
            loss.backward()
            dropped = [a and b for a, b in zip(dropped, handle.mask or (), strict=True)]
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for part, never in zip(parts, dropped, strict=True):
            moved = not torch.equal(model.get_parameter(f"{part}.0.weight"), before[f"{part}.0.weight"])
            assert moved != never, part


class Waits(TorchDispatchMode):
    """Counts the operators for which the host waits for the device, and looks at data that would lead to one."""

    NAMES = ("_local_scalar_dense", "is_nonzero", "equal", "any", "all", "count_nonzero", "norm")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in func.name().split("::")[1].split(".")[0].split("_foreach_") for name in self.NAMES)
        return func(*args, **(kwargs or {}))


def waits_of(steps: int, accumulate: int, to_none: bool, masks: str = "exact") -> int:
    model = plain_net()
    dropbp.enable(model, 0.5, masks=masks, example_inputs=plain_batch())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Waits() as waits:
        for _ in range(steps):
            for _ in range(accumulate):
                plain_loss(model).backward()
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
    return waits.count


@pytest.mark.parametrize("masks", ["exact", "nested", "independent"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_host_waits_for_no_device_in_ordinary_steps(accumulate: int, masks: str) -> None:
    assert waits_of(6, accumulate, True, masks) == 0


def test_where_gradients_are_set_to_zero_they_are_looked_at_once_a_step() -> None:
    looks = 6 * sum(1 for _ in plain_net().parameters())
    assert 0 < waits_of(6, 4, False) <= looks


def test_a_gradient_of_zero_that_a_backward_made_stays() -> None:
    model = plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    with handle.fixed([False] * 6):
        (plain_loss(model) * 0).backward()
    with handle.fixed([True] * 6):
        plain_loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_gradient_put_in_place_by_hand_is_looked_at() -> None:
    model = plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with handle.fixed([True] * 6):
            plain_loss(model).backward()
        assert model.get_parameter("blocks.0.mlp.0.weight").grad is None


def test_a_backward_vouches_only_for_gradients_that_it_wrote() -> None:
    model = plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    with handle.fixed([False] * 6):
        plain_loss(model).backward()
        model.zero_grad(set_to_none=False)
        torch.autograd.grad(plain_loss(model), list(model.parameters()))
    with handle.fixed([True] * 6):
        plain_loss(model).backward()
    assert model.get_parameter("blocks.0.mlp.0.weight").grad is None


def test_one_backward_of_two_forwards_keeps_what_either_has_kept() -> None:
    model, plain = plain_net(), plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    for net in (model, plain):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
    with handle.fixed([True] * 6):
        skipped = plain_loss(model)
    with handle.fixed([False] * 6):
        (skipped * 0 + plain_loss(model)).backward()
    plain_loss(plain).backward()
    assert_same_gradients(*({n: p.grad for n, p in net.named_parameters()} for net in (model, plain)))


def test_hooks_on_parameters_and_optimizers_are_gone_after_removal() -> None:
    gc.collect()  # handles of other tests that were dropped without being removed
    before, model = len(_global_optimizer_post_hooks), plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    plain_loss(model).backward()
    assert len(_global_optimizer_post_hooks) == before + 1
    handle.remove()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())  # type: ignore[attr-defined]
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize("kernel", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled"])
@pytest.mark.parametrize("way", ["optimizer", "model"])
def test_after_a_step_that_the_scaler_skipped_zeroed_gradients_of_dropped_branches_move_nothing(
    way: str, unscale: bool, kernel: dict[str, bool]
) -> None:
    """A fused optimizer makes the step all the same, with a kernel that does nothing."""
    model = plain_net()
    handle = dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1, **kernel)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(12):
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        scaler.scale(plain_loss(model) * (float("inf") if step % 3 == 1 else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        to_zero(way, model, optimizer)
        moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
        dropped = sum(1 << place for place, drop in enumerate(handle.mask or ()) if drop)
        needs = handle.engine.structure.parameters.items()
        assert moved.isdisjoint(name for name, need in needs if not need & ~dropped), step
        assert bool(moved) == (step % 3 != 1)


class Flat(nn.Module):
    """Branches of which some end with a view, and some do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = self.stem(x_BSD)
        for block in self.blocks:
            x_BSD = x_BSD + block(x_BSD)
        return x_BSD


def _tangent(model: nn.Module) -> Tensor | None:
    with forward_ad.dual_level():
        x = plain_batch()
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent


def _jvp_of_inputs(model: nn.Module) -> Tensor:
    return torch.func.jvp(model, (plain_batch(),), (plain_batch().cos(),))[1]


def _jvp_of_parameters(model: nn.Module) -> Tensor:
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    along = {name: parameter.cos() for name, parameter in own.items()}
    return torch.func.jvp(lambda p: torch.func.functional_call(model, p, (plain_batch(),)), (own,), (along,))[1]


@pytest.mark.parametrize("make", [plain_net, Flat])
@pytest.mark.parametrize("options", [{}, {"masks": "exact"}, {"masks": "exact", "max_activations": 0.01}], ids=str)
@pytest.mark.parametrize("derivative", [_tangent, _jvp_of_inputs, _jvp_of_parameters])
def test_forward_mode_gives_the_full_derivative_under_any_mask(
    make: Callable[[], nn.Module], options: dict[str, Any], derivative: Callable[[nn.Module], Tensor]
) -> None:
    plain, model = make().train(), make().train()
    handle = dropbp.enable(model, 0.5, example_inputs=plain_batch(), **options)
    expected, branches = derivative(plain), len(handle.branches)
    for _ in range(4):
        torch.testing.assert_close(derivative(model), expected)
    for mask in ([True] * branches, [i % 2 == 0 for i in range(branches)]):
        with handle.fixed(mask):
            torch.testing.assert_close(derivative(model), expected)


def test_no_hook_on_optimizers_is_left_by_an_enable_that_failed_or_a_handle_that_was_forgotten() -> None:
    gc.collect()
    before, model = len(_global_optimizer_post_hooks), plain_net()
    with pytest.raises(ConfigError, match="rates") as kept:  # what was raised holds all that was made
        dropbp.enable(model, 0.5, rates=[0.5] * 5, example_inputs=plain_batch())
    assert len(_global_optimizer_post_hooks) == before and kept.value
    dropbp.enable(model, 0.5, masks="exact", example_inputs=plain_batch())
    plain_loss(model).backward()
    assert len(_global_optimizer_post_hooks) == before + 1
    del model, kept
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_looking_up_embeddings_outside_of_the_forward_is_no_cause_for_a_warning(caplog: Any) -> None:
    model = tiny_llama()
    dropbp.enable(model, 0.5)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model.get_input_embeddings()(tokens())
        llama_loss(model).backward()
    assert not caplog.records


class Transposed(nn.Module):
    """Multiplies rows that are not contiguous with a weight of its own, as WavLM does."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.norm = way, nn.LayerNorm(32)
        self.weight_DD, self.bias_D = nn.Parameter(torch.randn(32, 32)), nn.Parameter(torch.randn(32))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return x_BSD + self.mixed(self.norm(x_BSD).transpose(0, 1)).transpose(0, 1)

    def mixed(self, x_SBD: Tensor) -> Tensor:
        weight, bias = self.weight_DD, self.bias_D
        if self.way == "matmul":
            return torch.matmul(x_SBD, weight.t()) + bias
        if self.way == "@":
            return x_SBD @ weight.t() + bias
        if self.way == "linear":
            return F.linear(x_SBD, weight=weight, bias=bias)
        return F.multi_head_attention_forward(
            x_SBD, x_SBD, x_SBD, 32, 2, None, bias.repeat(3), None, None, False, 0.0, weight, bias,
            use_separate_proj_weight=True, q_proj_weight=weight, k_proj_weight=weight, v_proj_weight=weight,
        )[0]  # fmt: skip


@pytest.mark.parametrize("masks", ["nested", "exact"])
@pytest.mark.parametrize("way", ["matmul", "@", "linear", "attention"])
def test_products_with_a_frozen_weight_keep_their_kernel(way: str, masks: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), *(Transposed(way) for _ in range(3)), nn.Linear(32, 8)).train()
    plain, x_BSD = copy.deepcopy(model), torch.randn(2, 12, 32)
    handle = dropbp.enable(model, 0.5, masks=masks, example_inputs=torch.randn(1, 12, 32))
    fixed = ([True] * 3, [True, False, True], [False, True, False])
    for dropped in (*fixed, *(None,) * 6):
        with handle.fixed(dropped) if dropped else contextlib.nullcontext():
            output, expected = model(x_BSD), plain(x_BSD)
        assert torch.equal(output, expected)
        model.zero_grad()
        output.sum().backward()
        lost = [i for i, drop in enumerate(handle.mask) if drop]
        assert all(model[1 + i].weight_DD.grad is None for i in lost)


def test_products_of_tensors_without_strides_are_left_alone() -> None:
    weight_DD = torch.randn(4, 4)
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)])
    assert not any(
        kernel_depends_on_weight(torch.matmul, (x, weight_DD), {}) for x in (torch.eye(4).to_sparse(), nested)
    )
    assert not kernel_depends_on_weight(torch.matmul, (torch.randn(2, 3, 4).to_sparse(), weight_DD), {})
    assert kernel_depends_on_weight(torch.matmul, (torch.randn(3, 2, 4).transpose(0, 1), weight_DD), {})
    assert not kernel_depends_on_weight(torch.add, (torch.randn(3, 2, 4).transpose(0, 1), weight_DD), {})
