"""Exceptions, threads, several models at once, and autocast."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dropbp
from dropbp.memory import track_tensor_bytes
from tests.common.engine_models import (
    PlainNet,
    assert_same_gradients,
    llama_loss,
    paper_gradients,
    plain_batch,
    plain_loss,
    plain_net,
    take_gradients,
    tiny_llama,
)

MASK = (True, False, False, True, True, False)


def _check(model, plain, handle, loss=plain_loss, mask=MASK):
    with handle.fixed(mask):
        got = take_gradients(model, loss(model))
    assert_same_gradients(got, paper_gradients(plain, [branch.name for branch in handle.branches], mask, loss))


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.error: type[BaseException] | None = None

    def forward(self, x):
        if self.error is not None:
            raise self.error("in the forward")
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["dropped", "kept", "outside"])
@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
def test_a_step_after_an_exception_is_right(error, place, kind):
    plain, model = plain_net(), plain_net(kind=kind)
    plain.stem, model.stem = (nn.Sequential(net.stem, Raises()) for net in (plain, model))
    for net in (plain, model):
        net.blocks[0].mix.append(Raises())
        net.blocks[1].mix.append(Raises())
    raises = {"dropped": model.blocks[0].mix[-1], "kept": model.blocks[1].mix[-1], "outside": model.stem[-1]}[place]
    handle = dropbp.enable(model, example_inputs=plain_batch())
    _check(model, plain, handle)
    raises.error = error
    with pytest.raises(error, match="in the forward"), handle.fixed(MASK):
        plain_loss(model)
    raises.error = None
    assert torch.is_grad_enabled() and torch.is_autocast_cache_enabled()
    assert handle.engine.runtime.running.get() is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    _check(model, plain, handle)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_an_exception_in_a_recomputation_leaves_nothing_behind(kind):
    plain, model = plain_net(), plain_net(kind=kind)
    for net in (plain, model):
        net.blocks[1].mix.append(Raises())
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with handle.fixed((False,) * 6):
        loss = plain_loss(model)
    model.blocks[1].mix[-1].error = RuntimeError
    with pytest.raises(RuntimeError, match="in the forward"):
        loss.backward()
    model.blocks[1].mix[-1].error = None
    _check(model, plain, handle)


class OutOfMemoryAt(TorchDispatchMode):
    """The n-th operation raises."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if not self.left:
            raise torch.OutOfMemoryError("out of memory")
        return func(*args, **(kwargs or {}))


def _try_step(model, loss, n):
    """Whether a step ran through without the n-th operation."""
    try:
        with OutOfMemoryAt(n):
            loss(model).backward()
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.zeros((), requires_grad=True).backward()  # autograd holds what was to be run until its next backward
    return True


class Telling(PlainNet):
    """Returns what lies inside a branch as well, where a call asks for it."""

    def forward(self, x, states=False):
        x = self.stem(x)
        inner = self.blocks[0].mix[:2](x)
        x = x + self.blocks[0].mix[2](inner)
        for block in self.blocks[1:]:
            x = block(x)
        outputs = self.head(self.norm(x))
        return (outputs, inner) if states else outputs


def _loss_with_states(model):
    outputs, inner = model(plain_batch(), states=True)
    return outputs.square().mean() + inner.square().mean()


@pytest.mark.parametrize("options", [{"masks": "nested", "stem": "rest"}, {"masks": "exact"}], ids=str)
@pytest.mark.parametrize("limit", [None, 0.01])
@pytest.mark.parametrize("loss", [plain_loss, _loss_with_states])
def test_a_failure_at_any_operation_keeps_no_tensor(options, limit, loss):
    model = Telling(blocks=2).train()
    handle = dropbp.enable(model, example_inputs=plain_batch(), max_activations=limit, **options)
    handle.engine.runtime.connect(torch.zeros(()), alone=True)  # makes what stays
    gc.disable()  # a script that catches the error and goes on does not wait for it either
    try:
        with track_tensor_bytes(model) as tracked, handle.fixed([True, False, False]):
            assert _try_step(model, plain_loss, 0)
            before, n = tracked.live_bytes, 1
            while not _try_step(model, loss, n):
                assert tracked.live_bytes == before, f"{tracked.live_bytes - before} bytes after operation {n}"
                n += 1
    finally:
        gc.enable()
    assert n > 50


@pytest.mark.parametrize("limit", [None, 0.01])
def test_a_step_that_is_tried_again_while_the_error_is_handled_is_right(limit):
    plain, model = plain_net(), plain_net()
    handle = dropbp.enable(model, example_inputs=plain_batch(), max_activations=limit)
    names = [branch.name for branch in handle.branches]
    n = 0
    with handle.fixed(MASK):
        plain_loss(model).backward()
        while True:
            n += 5
            model.zero_grad()
            try:
                with OutOfMemoryAt(n):
                    plain_loss(model).backward()
                break
            except torch.OutOfMemoryError:
                got = take_gradients(model, plain_loss(model, plain_batch()[:1]))
                expected = paper_gradients(plain, names, MASK, lambda net: plain_loss(net, plain_batch()[:1]))
                assert_same_gradients(got, expected)
    assert n > 50


def test_a_backward_that_failed_leaves_no_plan_to_a_later_one():
    model = plain_net(kind="non-reentrant")
    model.blocks[1].mix.append(Raises())
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with handle.fixed((False,) * 6):
        loss = plain_loss(model)
    model.blocks[1].mix[-1].error = RuntimeError
    with pytest.raises(RuntimeError, match="in the forward"):
        loss.backward()
    assert not handle.engine.runtime.tasks


def test_an_exception_in_the_loss_changes_nothing_for_the_next_step():
    plain, model = plain_net(), plain_net()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with pytest.raises(ZeroDivisionError):
        plain_loss(model) / (1 // 0)
    _check(model, plain, handle)


@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
def test_two_threads_train_two_models(kind):
    pairs = [(plain_net(kind=kind), plain_net()) for _ in range(3)]

    def train(seed):
        model, plain = pairs[seed]
        handle = dropbp.enable(model, example_inputs=plain_batch(), seed=seed, stem="train")
        for _ in range(20):
            loss = plain_loss(model)
            got = take_gradients(model, loss)
            names = [branch.name for branch in handle.branches]
            assert_same_gradients(got, paper_gradients(plain, names, handle.mask, plain_loss))
        return handle.report()["forwards"]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(train, [1, 2])) == [20, 20]


@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
def test_two_threads_train_one_model_with_masks_of_their_own(kind):
    plain, model = plain_net(), plain_net(kind=kind)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    names = [branch.name for branch in handle.branches]
    parameters = dict(model.named_parameters())
    cases = [MASK, tuple(not drop for drop in MASK)]
    expected = [paper_gradients(plain, names, mask, plain_loss) for mask in cases]
    barrier = threading.Barrier(2)

    def train(case):
        for _ in range(30):
            barrier.wait()
            with handle.fixed(cases[case]):
                x = plain_batch().requires_grad_()
                loss = plain_loss(model, x)
            barrier.wait()
            # A reentrant checkpoint allows no torch.autograd.grad: each thread takes what a hook of its own sees.
            yield _gradients_of(loss, parameters, kind), expected[case]

    def run(case):
        for got, right in train(case):
            if kind == "reentrant":
                continue
            assert_same_gradients(got, right)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, [0, 1]))
    assert handle.report()["forwards"] == 60
    if kind == "reentrant":  # both threads added to the same gradients
        for name, parameter in parameters.items():
            sums = [gradients[name] for gradients in expected if gradients[name] is not None]
            torch.testing.assert_close(parameter.grad, 30 * sum(sums), rtol=1e-4, atol=1e-6)


def _gradients_of(loss, parameters, kind):
    if kind == "reentrant":
        with LOCK:
            loss.backward()
        return None
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


LOCK = threading.Lock()


def test_two_models_enabled_at_once_do_not_disturb_each_other():
    models, plains = [plain_net(), tiny_llama(layers=3)], [plain_net(), tiny_llama(layers=3)]
    losses = [plain_loss, llama_loss]
    handles = [dropbp.enable(models[0], example_inputs=plain_batch()), dropbp.enable(models[1])]
    for handle, model, plain, loss in zip(handles, models, plains, losses, strict=True):
        _check(model, plain, handle, loss)
    handles[0].remove()
    _check(models[1], plains[1], handles[1], llama_loss)
    assert handles[0].mask == MASK


def test_a_model_inside_another_forward_keeps_its_own_masks():
    """A teacher's training forward inside a student's: each root has its own state."""
    inner, outer, plain = plain_net(), plain_net(), plain_net()
    teacher = dropbp.enable(inner, example_inputs=plain_batch())
    student = dropbp.enable(outer, example_inputs=plain_batch())
    outer.stem.register_forward_hook(lambda module, args, output: output + 0 * inner(args[0]))
    plain.stem.register_forward_hook(lambda module, args, output: output + 0.0)
    with teacher.fixed([True] * 6):
        _check(outer, plain, student)
    assert teacher.mask == (True,) * 6


def test_a_weight_cast_first_in_a_dropped_branch_gets_its_gradient_from_a_kept_one():
    """Autocast remembers casts of weights within a region; a cast without history would cut off the later use."""
    model, plain = tiny_llama(), tiny_llama()
    handle = dropbp.enable(model)
    names = [branch.name for branch in handle.branches]

    def gradients(net, run):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = run((True,) * 4) + run((False,) * 4)
        return take_gradients(net, loss)

    def ours(mask):
        with handle.fixed(mask):
            return llama_loss(model)

    got = gradients(model, ours)
    whole = take_gradients(plain, _in_autocast(plain))
    part = paper_gradients(plain, names, (True,) * 4, _in_autocast)
    for name, gradient in got.items():
        assert gradient is not None, name
        expected = whole[name] + (0 if part[name] is None else part[name])
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def _in_autocast(net):
    with torch.autocast("cpu", torch.bfloat16):
        return llama_loss(net)


class Tied(nn.Module):
    """Two branches that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        return x + self.second(x)


@pytest.mark.parametrize("mask", [(True, False), (False, True)])
def test_a_weight_shared_by_a_dropped_and_a_kept_branch_gets_the_kept_ones_gradient(mask):
    model, plain = Tied().train(), Tied().train()
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with handle.fixed(mask):
        got = take_gradients(model, _autocast_loss(model))
    assert got["first.weight"] is not None
    expected = paper_gradients(plain, ["first", "second"], mask, _autocast_loss)
    assert_same_gradients(got, expected)


def _autocast_loss(net):
    with torch.autocast("cpu", torch.bfloat16):
        return net(plain_batch()).float().square().mean()


@pytest.mark.parametrize("kind", [None, "reentrant", "non-reentrant"])
def test_autocast_with_checkpointing_is_that_of_the_plain_model(kind):
    model, plain = plain_net(kind=kind), plain_net(kind=kind)
    handle = dropbp.enable(model, example_inputs=plain_batch())
    with handle.fixed((False,) * 6):
        assert_same_gradients(
            take_gradients(model, _autocast_loss(model)), take_gradients(plain, _autocast_loss(plain))
        )
    for mask in (MASK, (True,) * 6):
        with handle.fixed(mask):
            got = take_gradients(model, _autocast_loss(model))
        names = [branch.name for branch in handle.branches]
        assert_same_gradients(got, paper_gradients(plain, names, mask, _autocast_loss))
