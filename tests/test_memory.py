"""Bytes of tensors are counted exactly, and counting changes nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dropbp.device import dynamo_graph_count
from dropbp.memory import saved_tensor_bytes, track_tensor_bytes

FLOAT_BYTES = 4


def make_block(width: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Blocks(nn.Module):
    """Residual blocks; `checkpointed` recomputes each of them."""

    def __init__(self, depth: int = 3, width: int = 32, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make_block(width) for _ in range(depth))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + (self.recomputed(block, x) if self.checkpointed else block(x))
        return x

    def recomputed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # A saved random state is not made by an operation, so the tracker does not see its 5056 bytes.
        output: torch.Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return output


def train_step(model: nn.Module, x: torch.Tensor) -> None:
    model(x).square().mean().backward()


def allocator_peak_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """The oracle: every allocation and release that PyTorch's CPU allocator reports to the profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        train_step(model, x)
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def test_storages_are_counted_from_creation_to_release() -> None:
    with track_tensor_bytes() as tracked:
        x = torch.zeros(100)
        y = x + 1
        assert tracked.live_bytes == 200 * FLOAT_BYTES
        view = y[:3].t()
        del y
        assert tracked.live_bytes == 200 * FLOAT_BYTES
        del x, view
        assert tracked.live_bytes == 0
    assert tracked.peak_bytes == 200 * FLOAT_BYTES


def test_no_python_runs_when_a_storage_is_freed() -> None:
    """An exception there, such as that of Ctrl-C, would be printed and lost."""
    ran: list[str] = []
    with track_tensor_bytes() as tracked:
        x = torch.zeros(100)
        sys.setprofile(lambda frame, event, _: ran.append(frame.f_code.co_name) if event == "call" else None)
        del x
        sys.setprofile(None)
        assert (ran, tracked.live_bytes) == ([], 0)


def test_storages_made_before_count_only_when_they_are_named() -> None:
    model, older = nn.Linear(4, 3), torch.zeros(5)
    with track_tensor_bytes() as tracked:
        older.add_(1)
        model.weight.detach().mul_(2)
        del older
    assert (tracked.live_bytes, tracked.peak_bytes) == (0, 0)
    with track_tensor_bytes(model) as tracked:
        assert tracked.live_bytes == (12 + 3) * FLOAT_BYTES


def test_gradients_and_optimizer_states_are_part_of_their_owner() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, torch.ones(2, 4))
    optimizer.step()
    with track_tensor_bytes(model, optimizer) as tracked:
        assert tracked.live_bytes == 3 * 12 * FLOAT_BYTES


def test_resized_storage_is_counted_at_its_new_size() -> None:
    with track_tensor_bytes() as tracked:
        x = torch.zeros(10)
        x.resize_(30)
        assert tracked.live_bytes == 30 * FLOAT_BYTES


def test_sparse_gradients_are_counted_by_their_parts() -> None:
    embedding = nn.Embedding(1000, 4, sparse=True)
    with track_tensor_bytes() as tracked:
        embedding(torch.tensor([1, 2])).sum().backward()
    assert 0 < tracked.live_bytes < 1000 * 4 * FLOAT_BYTES


@pytest.mark.parametrize("checkpointed", [False, True])
def test_peak_equals_that_of_the_allocator_to_the_byte(checkpointed: bool) -> None:
    model, x = Blocks(checkpointed=checkpointed), torch.randn(8, 32)
    train_step(model, x)
    model.zero_grad()
    expected = allocator_peak_bytes(model, x)
    model.zero_grad()
    with track_tensor_bytes() as tracked:
        train_step(model, x)
    assert tracked.peak_bytes == expected


def test_tracking_leaves_gradients_bit_identical() -> None:
    model, x = Blocks(), torch.randn(8, 32)
    train_step(model, x)
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with track_tensor_bytes():
        train_step(model, x)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert torch.equal(parameter.grad, gradient)


def test_function_first_called_while_tracked_is_compiled_later() -> None:
    compiled = torch.compile(lambda x: (x * 2).sin(), backend="eager")
    x = torch.ones(8)
    with track_tensor_bytes() as tracked:
        compiled(x)
    assert tracked.peak_bytes == 2 * 8 * FLOAT_BYTES
    before = dynamo_graph_count()
    compiled(x)
    assert dynamo_graph_count() == before + 1


def test_peak_falls_by_what_a_branch_without_gradients_would_have_saved() -> None:
    model, x = Blocks(), torch.randn(8, 32)

    def peak_bytes(*, drop_last: bool) -> int:
        model.zero_grad()
        with track_tensor_bytes() as tracked:
            h = model.blocks[1](model.blocks[0](x))
            with torch.set_grad_enabled(not drop_last):
                branch = model.blocks[2](h)
            (h + branch).sum().backward()
        return tracked.peak_bytes

    assert peak_bytes(drop_last=True) < peak_bytes(drop_last=False)


def test_tracking_works_without_data() -> None:
    with torch.device("meta"):
        model, x = Blocks(), torch.empty(8, 32)
    with track_tensor_bytes() as tracked:
        train_step(model, x)
    assert tracked.live_bytes == sum(parameter.nbytes for parameter in model.parameters())


def test_saved_bytes_are_those_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Sigmoid())
    x = torch.randn(5, 4)
    # Linear keeps its input and its weight (a parameter), sigmoid its output; the sum keeps nothing.
    assert saved_tensor_bytes(lambda: model(x).sum()) == (5 * 4 + 5 * 6) * FLOAT_BYTES


def test_storage_saved_twice_counts_once() -> None:
    x = torch.randn(7, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x.exp()  # keeps y
        return (y * y).sum()  # keeps y, twice

    assert saved_tensor_bytes(forward) == 7 * FLOAT_BYTES


def test_views_of_frozen_parameters_are_left_out_when_the_model_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].requires_grad_(False)
    x = torch.randn(3, 4)
    assert saved_tensor_bytes(lambda: model(x), exclude=[model]) == 3 * 4 * FLOAT_BYTES
    assert saved_tensor_bytes(lambda: model(x), exclude=[model, x]) == 0


def test_checkpointing_saves_less() -> None:
    x = torch.randn(8, 32)
    plain, checkpointed = Blocks(), Blocks(checkpointed=True)
    plain_bytes = saved_tensor_bytes(lambda: plain(x), exclude=[plain])
    assert 0 < saved_tensor_bytes(lambda: checkpointed(x), exclude=[checkpointed]) < plain_bytes / 4


def test_saved_bytes_need_no_data_and_no_gradient_mode() -> None:
    x = torch.randn(8, 32)
    model = Blocks()
    expected = saved_tensor_bytes(lambda: model(x), exclude=[model])
    with torch.no_grad():
        assert saved_tensor_bytes(lambda: model(x), exclude=[model]) == expected
    with torch.device("meta"):
        meta_model, meta_x = Blocks(), torch.empty(8, 32)
    assert saved_tensor_bytes(lambda: meta_model(meta_x), exclude=[meta_model]) == expected
    with FakeTensorMode():  # type: ignore[no-untyped-call]
        fake_model, fake_x = Blocks(), torch.empty(8, 32)
        assert saved_tensor_bytes(lambda: fake_model(fake_x), exclude=[fake_model]) == expected
