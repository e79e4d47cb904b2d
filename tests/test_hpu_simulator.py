"""The simulated HPU is a faithful device, and its recorder tells what Gaudi's software would compile.

The simulation is process-global, so every test runs a group of checks (functions `check_*` below) in a process of its
own: this file, started as a script with the name of the group.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
import types
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

pytestmark = pytest.mark.timeout(600)  # the first one also builds the extension

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    variables = ENVIRONMENT | environment
    return subprocess.run(command, check=False, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=580)


def assert_group_passes(group: str) -> None:
    done = run_python(str(HERE), group)
    assert done.returncode == 0, done.stdout + done.stderr


def test_operators_and_their_gradients_agree_with_the_cpu():
    assert_group_passes("operators")


def test_tensors_behave_as_on_any_device():
    assert_group_passes("tensors")


def test_training_gives_the_same_numbers_as_on_the_cpu():
    assert_group_passes("training")


def test_recorder_knows_recipes_launches_and_flushes():
    assert_group_passes("recorder")


def test_eager_mode_compiles_by_region():
    assert_group_passes("eager")


def test_habana_frameworks_answers_as_on_gaudi():
    assert_group_passes("habana")


def test_stock_trainer_trains_saves_and_resumes():
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    assert_group_passes("trainer")


SCRIPT = """
import sys, torch
device = torch.device("hpu")
layer = torch.nn.Linear(4, 4).to(device)
optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
for _ in range(int(sys.argv[1])):
    loss = layer(torch.ones(2, 4, device=device)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
sys.exit(3)
"""


def test_command_runs_a_script_and_reports(tmp_path: Path):
    script, report = tmp_path / "train.py", tmp_path / "report.json"
    script.write_text(SCRIPT)
    options = ["--lazy", "--memory", "1MiB", "--json", str(report)]
    done = run_python("-m", "dropbp.backends.hpu_simulator", *options, str(script), "6")
    assert done.returncode == 3, done.stderr
    assert "recipes compiled" in done.stderr
    result = json.loads(report.read_text())
    assert result["limit_bytes"] == 2**20
    assert len(result["steps"]) == 6
    assert result["late_recompiles_per_step"] == 0
    assert result["launches_per_step"] == 1
    assert result["flushes"] == {"item": 6}
    assert 0 < result["peak_bytes"] < 4096


def test_command_refuses_nonsense_memory():
    done = run_python("-m", "dropbp.backends.hpu_simulator", "--memory", "96 gigs", "x.py")
    assert done.returncode != 0
    assert "'96 gigs' is not an amount of memory" in done.stderr


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path):
    code = "from dropbp.backends import hpu_simulator as s; s.install()"
    done = run_python("-c", code, DROPBP_CACHE_DIR=str(tmp_path), CXX="no-such-compiler")
    assert "DeviceError" in done.stderr
    assert "not found: no-such-compiler" in done.stderr


def test_installing_after_transformers_has_looked_is_refused():
    pytest.importorskip("transformers")
    code = (
        "from transformers.utils.import_utils import is_torch_hpu_available as probe; probe()\n"
        "from dropbp.backends import hpu_simulator as s; s.install()"
    )
    done = run_python("-c", code)
    assert "comes too late" in done.stderr


def test_importing_the_package_installs_nothing():
    code = "import sys, dropbp, dropbp.backends.hpu_simulator; assert 'habana_frameworks' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


# --- what runs in the other process ------------------------------------------------------------------------------


def close(actual: torch.Tensor, expected: torch.Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual.detach().cpu(), expected.detach().cpu(), equal_nan=True, **tolerance)


def raises(error: type[Exception], text: str, function: Callable[[], object]) -> None:
    with pytest.raises(error, match=re.escape(text)):
        function()


# operators: those of PyTorch's own table of operators, three samples each

NOT_STRIDED = ("sparse", "jiterator", "to_sparse")
UNINITIALISED = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted")
# as_strided's samples look at memory outside the tensor; tensor_split wants its indices on the CPU, on every device;
# the others draw from generators that are seeded in the samples.
NOT_COMPARED = (
    "as_strided",
    "tensor_split",
    "nn.functional.fractional_max_pool2d",
    "nn.functional.fractional_max_pool3d",
)


def operator_table() -> list:
    sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
    from torch.testing._internal.common_methods_invocations import op_db

    return [
        op
        for op in op_db
        if torch.float32 in op.dtypes
        and op.name not in NOT_COMPARED
        and not any(word in op.name for word in NOT_STRIDED)
    ]


def to_device(value: object, device: str) -> object:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device).requires_grad_(value.requires_grad)
    return torch.device(device) if isinstance(value, torch.device) else device if value == "cpu" else value


def call_with_gradients(op, sample, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    arguments = tree_map(lambda value: to_device(value, device), (sample.input, *sample.args))
    named = tree_map(lambda value: to_device(value, device), sample.kwargs)
    torch.manual_seed(0)
    outputs = [leaf for leaf in tree_leaves(op.op(*arguments, **named)) if isinstance(leaf, torch.Tensor)]
    inputs = [leaf for leaf in tree_leaves((arguments, named)) if getattr(leaf, "requires_grad", False)]
    losses = [output.abs().sum() for output in outputs if output.requires_grad]
    if not inputs or not losses or not op.supports_autograd:
        return outputs, []
    gradients = torch.autograd.grad(sum(losses), inputs, allow_unused=True)
    return outputs, [gradient for gradient in gradients if gradient is not None]


def samples_that_run_on_the_cpu(op) -> Iterator[tuple]:
    found = 0
    for sample in op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd):
        try:
            yield sample, call_with_gradients(op, sample, "cpu")
        except Exception:
            continue
        found += 1
        if found == 3:
            return


def compare_operator(op) -> int:
    compared = 0
    for sample, expected in samples_that_run_on_the_cpu(op):
        actual = call_with_gradients(op, sample, "hpu")
        compared += 1
        for got, wanted in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
            if wanted.layout == torch.strided and op.name not in UNINITIALISED:
                assert got.device.type == "hpu", got.device
                close(got, wanted)
    return compared


def check_operators_agree() -> None:
    warnings.simplefilter("ignore")
    failed, compared = {}, 0
    for op in operator_table():
        try:
            compared += compare_operator(op) > 0
        except Exception as error:
            failed[f"{op.name} {op.variant_test_name}"] = str(error)[:300]
    assert not failed, failed
    assert compared > 550, f"only {compared} operators were compared"


# tensors


def check_views_share_storage() -> None:
    base = torch.zeros(4, 6, device="hpu")
    base.t()[2].add_(1)
    base[1:3, ::2].mul_(0).sub_(5)
    expected = torch.zeros(4, 6)
    expected.t()[2].add_(1)
    expected[1:3, ::2].mul_(0).sub_(5)
    close(base, expected)
    assert base.view(-1).data_ptr() == base.data_ptr()
    parts = base.chunk(2)
    parts[1].fill_(7)
    assert base[3, 3].item() == 7


def check_in_place_out_and_resize() -> None:
    out = torch.empty(0, device="hpu")
    result = torch.add(torch.ones(3, device="hpu"), 2, out=out)
    assert result is out
    assert out.tolist() == [3.0, 3.0, 3.0]
    tensor = torch.arange(4.0, device="hpu")
    before = torch.hpu.memory_allocated()
    tensor.resize_(1000)
    assert tensor[:4].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert torch.hpu.memory_allocated() - before == 4000 - 16
    tensor.untyped_storage().resize_(0)
    assert torch.hpu.memory_allocated() - before == -16
    tensor = torch.ones(2, device="hpu")
    tensor.set_(torch.zeros(3, device="hpu"))
    assert tensor.tolist() == [0.0, 0.0, 0.0]


def check_version_counter_catches_in_place_changes() -> None:
    leaf = torch.ones(3, device="hpu", requires_grad=True)
    square = leaf.exp()
    loss = (square * square).sum()
    square.add_(1)
    raises(RuntimeError, "modified by an inplace operation", loss.backward)


def check_save_load_pickle_deepcopy() -> None:
    tensor, linear = torch.randn(3, 4, device="hpu"), nn.Linear(2, 2).to("hpu")
    buffer = io.BytesIO()
    torch.save({"a": tensor, "view": tensor[1], "model": linear.state_dict()}, buffer)
    for location, device in ((None, "hpu"), ("cpu", "cpu"), ("hpu:0", "hpu")):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=location)
        assert loaded["a"].device.type == device
        close(loaded["a"], tensor)
        assert loaded["view"].data_ptr() == loaded["a"][1].data_ptr()
    close(pickle.loads(pickle.dumps(tensor)), tensor)
    twin = copy.deepcopy(linear)
    assert twin.weight.device.type == "hpu"
    assert twin.weight.data_ptr() != linear.weight.data_ptr()
    close(twin.weight, linear.weight)


def check_devices_do_not_mix() -> None:
    here, there = torch.ones(3, device="hpu"), torch.ones(3)
    raises(RuntimeError, "Expected all tensors to be on the same device", lambda: here + there)
    raises(RuntimeError, "Expected all tensors to be on the same device", lambda: torch.cat([here, there]))
    raises(RuntimeError, "Expected all tensors to be on the same device", lambda: there.add_(here))
    assert (here + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]
    assert here[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
    raises(RuntimeError, "indices should be", lambda: there[torch.tensor([0], device="hpu")])


def check_a_process_has_one_of_eight_devices() -> None:
    """The machine has eight; the own one is `hpu:0`, and what only that one has cannot be asked of another."""
    assert torch.hpu.device_count() == torch.accelerator.device_count() == 8
    assert torch.hpu.current_device() == 0 and torch.ones(1, device="hpu").device == torch.device("hpu", 0)
    raises(RuntimeError, "get_rng_state supports only device 0", lambda: torch.hpu.get_rng_state(1))
    raises(
        RuntimeError, "set_rng_state supports only device 0", lambda: torch.hpu.set_rng_state(torch.zeros(1), "hpu:1")
    )
    raises(RuntimeError, "habana active device: 1 != 0", lambda: torch.ones(1, device="hpu:1"))
    raises(AssertionError, "Requested device_id=1", lambda: torch.hpu.device(1))
    raises(AssertionError, "there are 8 devices", lambda: torch.hpu.set_device(8))
    raises(TypeError, "synchronize", lambda: torch.hpu.synchronize("hpu:0"))
    with unittest.mock.patch.dict(os.environ):
        torch.hpu.set_device(3)
        assert torch.hpu.current_device() == 0 and torch.hpu.device(3).idx == 3
    assert torch.hpu.memory_allocated(7) == torch.hpu.memory_allocated()


def check_no_other_accelerator_is_left() -> None:
    """Of a build with CUDA no more is seen than of one without."""
    assert not torch.cuda.is_available() and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("hpu")
    assert torch.Generator("hpu").device.type == torch.Stream().device.type == "hpu"


def check_pointwise_results_are_contiguous() -> None:
    matrix = torch.randn(3, 5, device="hpu").t()
    assert not matrix.is_contiguous()
    assert (matrix + 1).is_contiguous()
    assert matrix.exp().is_contiguous()
    assert matrix.add_(1).stride() == (1, 5)
    image = torch.randn(2, 3, 4, 4, device="hpu").to(memory_format=torch.channels_last)
    assert image.relu().is_contiguous()


def check_memory_is_counted_and_bounded() -> None:
    torch.hpu.reset_peak_memory_stats()
    before = torch.hpu.memory_allocated()
    tensor = torch.empty(1024, device="hpu")
    assert torch.hpu.memory_allocated() - before == 4096
    double = tensor + tensor
    del double
    assert torch.hpu.memory_allocated() - before == 4096
    assert torch.hpu.max_memory_allocated() - before == 8192
    free, total = torch.hpu.mem_get_info()
    assert (free, total) == (total - torch.hpu.memory_allocated(), torch.hpu.memory_reserved())
    simulator().set_memory_limit("1MiB")
    raises(
        RuntimeError,
        "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",
        lambda: torch.empty(2**20, device="hpu"),
    )
    wide = tensor.expand(1024, 1024)
    raises(RuntimeError, "Allocation failed", wide.contiguous)
    del tensor, wide
    assert torch.hpu.memory_allocated() == before
    simulator().set_memory_limit("96GiB")


def check_random_numbers() -> None:
    torch.manual_seed(3)
    host, device = torch.rand(4), torch.rand(4, device="hpu")
    close(device, host)
    state = torch.hpu.get_rng_state()
    first = torch.randn(3, device="hpu")
    with torch.random.fork_rng(devices=[0], device_type="hpu"):
        torch.randn(9, device="hpu")
    torch.hpu.set_rng_state(state)
    close(torch.randn(3, device="hpu"), first)
    untouched = torch.get_rng_state()
    F.dropout(torch.ones(9, device="hpu"), 0.5)
    torch.native_dropout(torch.ones(9, device="hpu"), 0.5, True)
    assert untouched.equal(torch.get_rng_state())
    mine = [torch.rand(2, device="hpu", generator=torch.Generator("hpu").manual_seed(5)) for _ in range(2)]
    close(mine[0], mine[1])


def check_accelerator_api() -> None:
    assert torch.accelerator.current_accelerator() == torch.device("hpu")
    torch.accelerator.synchronize()
    with torch.hpu.stream(torch.hpu.Stream()):
        start, end = torch.hpu.Event(enable_timing=True), torch.hpu.Event(enable_timing=True)
        start.record()
        end.record()
    assert start.elapsed_time(end) >= 0
    assert torch.ones(2).pin_memory().is_pinned()
    with torch.device("hpu"):
        assert torch.zeros(2).device.type == "hpu"


class _Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((2,), float(index))


def check_data_loader_workers() -> None:
    torch.ones(1, device="hpu").item()
    loader = torch.utils.data.DataLoader(_Numbers(), batch_size=4, num_workers=2, pin_memory=True)
    total = sum(batch.to("hpu", non_blocking=True).sum() for batch in loader)
    assert total.item() == 2 * sum(range(8))


# training


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 11)
    )


def train(device: str, make_optimizer: Callable[..., torch.optim.Optimizer], steps: int = 4) -> list[torch.Tensor]:
    model = small_model().to(device)
    optimizer = make_optimizer(model.parameters())
    tokens = (torch.arange(24).reshape(4, 6) % 11).to(device)
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


def check_optimizers() -> None:
    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
        "adamw loop": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
        "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
        "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    }
    for name, make in makers.items():
        for host, device in zip(train("cpu", make), train("hpu", make), strict=True):
            assert (host - device).abs().max() <= 1e-6, name


def check_autograd_functions_and_double_backward() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 3

    x = torch.ones(3, device="hpu", requires_grad=True)
    Double.apply(x).sum().backward()
    assert x.grad.tolist() == [3.0] * 3
    (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [6.0] * 3


def check_checkpointing_repeats_dropout() -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        results = []
        for use in (False, True):
            block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).to("hpu")
            block.load_state_dict({key: torch.full_like(value, 0.1) for key, value in block.state_dict().items()})
            x = torch.arange(8.0, device="hpu").reshape(2, 4).requires_grad_()
            torch.manual_seed(7)
            (checkpoint(block, x, use_reentrant=reentrant) if use else block(x)).sum().backward()
            results.append(x.grad)
        close(results[0], results[1])


def check_attention_convolution_and_norms() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, 6, 8) for _ in range(3)]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for kwargs in ({"is_causal": True}, {"attn_mask": mask}):
        moved = {key: value.to("hpu") if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
        host = F.scaled_dot_product_attention(*inputs, **kwargs)
        close(F.scaled_dot_product_attention(*(t.to("hpu") for t in inputs), **moved), host, rtol=1e-5, atol=1e-5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 2, 2))
    image = torch.randn(2, 3, 9, 9)
    twin = copy.deepcopy(net).to("hpu")
    net(image).square().sum().backward()
    twin(image.to("hpu")).square().sum().backward()
    for host, device in zip(net.parameters(), twin.parameters(), strict=True):
        close(device.grad, host.grad, rtol=1e-4, atol=1e-4)
    lstm = nn.LSTM(3, 4, batch_first=True)
    host = lstm(torch.ones(2, 5, 3))[0]
    close(lstm.to("hpu")(torch.ones(2, 5, 3, device="hpu"))[0], host)


def check_autocast_follows_gaudis_lists() -> None:
    x, w = torch.randn(2, 4, device="hpu"), torch.randn(4, 4, device="hpu", requires_grad=True)
    with torch.autocast("hpu", dtype=torch.bfloat16):
        assert (x @ w).dtype == torch.bfloat16
        assert F.linear(x, w).dtype == torch.bfloat16
        assert x.softmax(-1).dtype == torch.bfloat16
        assert F.layer_norm(x, (4,)).dtype == torch.bfloat16
        assert (x.bfloat16() + x).dtype == torch.float32
        assert x.bfloat16().exp().dtype == torch.float32
        assert x.bfloat16().relu().dtype == torch.bfloat16
        with torch.autocast("hpu", enabled=False):
            assert (x @ w).dtype == torch.float32
        (x @ w).float().sum().backward()
    assert w.grad.dtype == torch.float32
    assert (x @ w).dtype == torch.float32


# recorder


def simulator():
    from dropbp.backends import hpu_simulator

    return hpu_simulator


def mark_step() -> None:
    import habana_frameworks.torch.core as htcore

    htcore.mark_step()


def counted(function: Callable[[], object]) -> dict[str, int]:
    """What a call adds to the counters; the recorder is flushed before and not after."""
    mark_step()
    before = simulator().counters()
    kept = function()
    after = simulator().counters()
    del kept
    return {name: after[name] - before[name] for name in ("misses", "hits", "launches", "ops")}


def check_equal_segments_share_a_recipe() -> None:
    weights = [torch.randn(4, 4, device="hpu") for _ in range(5)]
    x = torch.randn(2, 4, device="hpu")
    mark_step()
    simulator().reset()
    for weight in weights:  # different memory, different values, the same graph
        x = torch.relu(x @ weight) * 1.5
        mark_step()
    assert simulator().counters()["recipes"] == 1
    assert simulator().counters()["launches"] == 5
    x = torch.relu(x @ weights[0]) * 2.5  # a float is not part of the graph
    mark_step()
    assert simulator().counters()["recipes"] == 1
    (recipe,) = simulator().recipes()
    assert recipe["names"] == ["aten::mm", "aten::relu", "aten::mul.Tensor"]
    assert recipe["launches"] == 6
    assert recipe["live_outputs"] == 1


def segment(change: str, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    first = x[:1] * y[:1] if change == "shape" else x * y
    second = first.double() if change == "dtype" else first
    third = second.t() @ second if change == "topology" else second.sum(1 if change == "integer" else 0)
    if change == "storage":
        third = (x * x).sum(0)
    return [first, third] if change == "live outputs" else [third]


def check_what_makes_a_new_recipe() -> None:
    x, y = torch.randn(4, 4, device="hpu"), torch.randn(4, 4, device="hpu")
    mark_step()
    simulator().reset()
    for change in ("nothing", "shape", "dtype", "topology", "integer", "storage", "live outputs"):
        for expected in ({"misses": 1, "hits": 0}, {"misses": 0, "hits": 1}):
            before = simulator().counters()
            kept = segment(change, x, y)
            mark_step()
            after = simulator().counters()
            assert {key: after[key] - before[key] for key in expected} == expected, change
            del kept


def check_gradients_left_out_make_a_new_recipe() -> None:
    """Why random masks are expensive: which parameters have a gradient is part of the optimizer's graph."""
    parameters = [nn.Parameter(torch.ones(3, device="hpu")) for _ in range(2)]
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def step(*with_gradient: int) -> None:
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.ones(3, device="hpu") if index in with_gradient else None
        mark_step()
        optimizer.step()
        mark_step()

    mark_step()
    step(0, 1)
    simulator().reset(forget_recipes=False)
    step(0, 1)
    assert simulator().counters()["misses"] == 0
    step(0)
    assert simulator().counters()["misses"] > 0


def check_what_flushes() -> None:
    x = torch.ones(4, device="hpu")
    mark_step()
    simulator().reset()
    (x + 1).sum().item()
    (x * 2).cpu()
    (x - 3).nonzero()
    x[x > 0]
    pending = x + 7
    torch.hpu.synchronize()
    (x + 4).equal(x)
    mark_step()  # nothing recorded, nothing launched
    del pending
    flushes = simulator().counters()["flushes"]
    assert flushes == {"item": 2, "copy_to_host": 1, "dynamic_shape": 2, "synchronize": 1}, flushes


def check_views_and_uploads_are_no_work() -> None:
    x = torch.ones(4, 4, device="hpu")
    assert counted(lambda: (x.t(), x[1], x.view(16), x.expand(2, 4, 4)))["ops"] == 0
    assert counted(lambda: torch.ones(3).to("hpu"))["ops"] == 0
    assert counted(lambda: torch.empty(3, device="hpu"))["ops"] == 0
    assert counted(lambda: x[torch.tensor([0, 1], device="hpu")])["launches"] == 0


def check_long_graphs_are_cut() -> None:
    from dropbp.backends.hpu_simulator._session import UNLIMITED_OPS, extension

    extension().configure(True, 5)
    x = torch.ones(4, device="hpu")
    mark_step()
    simulator().reset()
    for _ in range(12):
        x = x + 1
    extension().configure(True, UNLIMITED_OPS)
    assert simulator().counters()["flushes"] == {"max_ops": 2}


def check_report_counts_optimizer_steps() -> None:
    weight = nn.Parameter(torch.ones(3, device="hpu"))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    simulator().reset()
    for _ in range(6):
        optimizer.zero_grad()
        (weight * 2).sum().backward()
        mark_step()
        optimizer.step()
        mark_step()
    report = simulator().report()
    assert len(report.steps) == 6
    assert report.recompiles_after(2) == 0
    assert report.late_recompiles_per_step == 0
    assert report.launches_per_step == 2
    assert "late recompiles per step" in str(report)
    json.dumps(report.as_dict())


# habana: the package that stands in for Gaudi's


def check_metrics() -> None:
    from habana_frameworks.torch.hpu.metrics import metric_global, metric_localcontext

    mark_step()
    simulator().reset()
    total = metric_global("graph_compilation")
    total.reset()
    with metric_localcontext("graph_compilation") as local:
        kept = torch.ones(5, device="hpu") * 3
        mark_step()
    again = torch.ones(5, device="hpu").cos()
    mark_step()
    assert dict(local.stats())["TotalNumber"] == 1
    assert dict(total.stats())["TotalNumber"] == 2
    assert metric_global("no such metric") is None
    del kept, again


def check_fused_optimizer_and_clipping() -> None:
    from habana_frameworks.torch.hpex.normalization import FusedClipNorm
    from habana_frameworks.torch.hpex.optimizers import FusedAdamW

    def train_fused(device: str) -> list[torch.Tensor]:
        model = small_model().to(device)
        parameters = list(model.parameters())
        options = {"lr": 0.01, "eps": 1e-12, "weight_decay": 0.1}
        optimizer = (FusedAdamW if device == "hpu" else torch.optim.AdamW)(parameters, **options)
        tokens = (torch.arange(24).reshape(4, 6) % 11).to(device)
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
            if device == "hpu":
                FusedClipNorm(parameters, 0.5).clip_norm(parameters)
            else:
                nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
        return [parameter.detach().cpu() for parameter in parameters]

    for host, device in zip(train_fused("cpu"), train_fused("hpu"), strict=True):
        assert (host - device).abs().max() < 1e-6


def check_fused_parts_mark_steps() -> None:
    from habana_frameworks.torch.hpex.normalization import FusedClipNorm
    from habana_frameworks.torch.hpex.optimizers import FusedAdamW

    parameters = [nn.Parameter(torch.ones(3, device="hpu")) for _ in range(4)]
    optimizer = FusedAdamW([{"params": parameters[:2]}, {"params": parameters[2:]}])
    clip = FusedClipNorm(parameters, 1.0)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones(3, device="hpu")
        mark_step()
        simulator().reset()
        clip.clip_norm(parameters)
        assert simulator().counters()["flushes"] == {"mark_step": 1}
        optimizer.step()
        assert simulator().counters()["flushes"] == {"mark_step": 3}


def check_device_is_a_gaudi2() -> None:
    from habana_frameworks.torch.utils.experimental import _get_device_type, synDeviceType
    from habana_frameworks.torch.utils.internal import is_lazy

    assert is_lazy() is True
    assert os.environ["PT_HPU_LAZY_MODE"] == "1"
    assert _get_device_type() == synDeviceType.synDeviceGaudi2
    assert torch.hpu.get_device_name() == "GAUDI2"
    assert set(torch.hpu.memory_stats()) >= {"Limit", "InUse", "MaxInUse", "NumAllocs", "NumFrees", "ActiveAllocs"}


def check_what_is_not_simulated_says_so() -> None:
    from habana_frameworks.torch.hpu import wrap_in_hpu_graph

    from dropbp.errors import DeviceError

    raises(DeviceError, "HPU graph", lambda: wrap_in_hpu_graph(nn.Linear(1, 1)))
    raises(ImportError, "HCCL", lambda: __import__("habana_frameworks.torch.distributed.hccl"))
    raises(DeviceError, "already runs in lazy mode", lambda: simulator().install(lazy=False))


def check_accelerate_and_transformers_find_it() -> None:
    try:
        from accelerate.utils.imports import is_hpu_available
        from transformers.utils.import_utils import is_torch_hpu_available
    except ImportError:
        return
    assert is_hpu_available()
    assert is_torch_hpu_available()


# eager mode


def check_every_operator_is_a_launch() -> None:
    from habana_frameworks.torch.utils.internal import is_lazy

    assert is_lazy() is False
    x = torch.ones(3, device="hpu")
    simulator().reset()
    for _ in range(3):
        x = (x + 1) * 2
    mark_step()
    assert simulator().counters()["flushes"] == {"eager": 6}
    assert simulator().counters()["recipes"] == 2


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def check_regional_compile() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(_Block() for _ in range(6)).to("hpu")
    plain = copy.deepcopy(layers)
    for layer in layers:
        layer.compile(backend="hpu_backend")
    simulator().reset()
    x = torch.randn(4, 8, device="hpu")
    graphs = []
    for _ in range(4):
        results = []
        for stack in (layers, plain):
            stack.zero_grad()
            hidden = x
            for layer in stack:
                hidden = hidden + layer(hidden)
            hidden.square().mean().backward()
            results.append([p.grad for p in stack.parameters()])
        for got, wanted in zip(*results, strict=True):
            close(got, wanted)
        graphs.append(sum(simulator().compiled_graphs().values()))
    assert graphs[0] == graphs[-1] > 0, graphs
    assert simulator().compiled_graphs().keys() >= {"forward", "backward"}
    assert simulator().counters()["flushes"]["region"] == 4 * 2 * 6


def check_compiled_views_and_pointwise_strides() -> None:
    @torch.compile(backend="hpu_backend", fullgraph=True)
    def mixed(x: torch.Tensor) -> torch.Tensor:
        return (x.t() + 1).exp().t().contiguous() @ x.t().cos()

    x = torch.randn(3, 5, device="hpu", requires_grad=True)
    y = x.detach().cpu().requires_grad_()
    got, wanted = mixed(x), (y.t() + 1).exp().t().contiguous() @ y.t().cos()
    close(got, wanted, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    wanted.sum().backward()
    close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


# trainer


class _Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 64, (12,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def make_trainer(folder: str, *, lora: bool, steps: int = 8, **options: object):
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1))
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, save_steps=4,
        logging_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=_Tokens())


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_stock_trainer_resumes_exactly() -> None:
    for lora in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            whole = make_trainer(folder, lora=lora, bf16=True)
            assert whole.args.device == torch.device("hpu:0")
            whole.train()
            resumed = make_trainer(folder, lora=lora, bf16=True)
            resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
        assert losses(resumed) == losses(whole)
        for first, second in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert first.equal(second)


def check_stock_trainer_has_the_losses_of_the_cpu() -> None:
    with tempfile.TemporaryDirectory() as folder:
        device = make_trainer(folder, lora=False)
        device.train()
    model = make_trainer(folder, lora=False).model.cpu()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    expected = []
    for batches in _trainer_batches():
        optimizer.zero_grad()
        total = [model(**batch, use_cache=False).loss / 2 for batch in batches]
        sum(total).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        expected.append(sum(loss.item() for loss in total))
    torch.testing.assert_close(losses(device), expected, rtol=1e-4, atol=1e-4)


def _trainer_batches() -> Iterator[list[dict[str, torch.Tensor]]]:
    """The batches that the trainer above draws: its sampler is seeded with 42."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, lora=False, use_cpu=True)
        torch.manual_seed(trainer.args.seed)
        batches = list(trainer.get_train_dataloader())
    for start in range(0, 16, 2):
        yield [{key: value.cpu() for key, value in batch.items()} for batch in batches[start : start + 2]]


def check_stock_trainer_stops_recompiling() -> None:
    simulator().reset()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(folder, lora=True, bf16=True, steps=10, save_strategy="no").train()
    report = simulator().report()
    assert len(report.steps) == 10
    assert report.recompiles_after(3) == 0, report
    assert report.launches_per_step < 20


GROUPS = {
    "operators": [check_operators_agree],
    "tensors": [
        check_views_share_storage,
        check_in_place_out_and_resize,
        check_version_counter_catches_in_place_changes,
        check_save_load_pickle_deepcopy,
        check_devices_do_not_mix,
        check_a_process_has_one_of_eight_devices,
        check_no_other_accelerator_is_left,
        check_pointwise_results_are_contiguous,
        check_memory_is_counted_and_bounded,
        check_random_numbers,
        check_accelerator_api,
        check_data_loader_workers,
    ],
    "training": [
        check_optimizers,
        check_autograd_functions_and_double_backward,
        check_checkpointing_repeats_dropout,
        check_attention_convolution_and_norms,
        check_autocast_follows_gaudis_lists,
    ],
    "recorder": [
        check_equal_segments_share_a_recipe,
        check_what_makes_a_new_recipe,
        check_gradients_left_out_make_a_new_recipe,
        check_what_flushes,
        check_views_and_uploads_are_no_work,
        check_long_graphs_are_cut,
        check_report_counts_optimizer_steps,
    ],
    "eager": [
        check_every_operator_is_a_launch,
        check_regional_compile,
        check_compiled_views_and_pointwise_strides,
    ],
    "habana": [
        check_metrics,
        check_fused_optimizer_and_clipping,
        check_fused_parts_mark_steps,
        check_device_is_a_gaudi2,
        check_what_is_not_simulated_says_so,
        check_accelerate_and_transformers_find_it,
    ],
    "trainer": [
        check_stock_trainer_resumes_exactly,
        check_stock_trainer_has_the_losses_of_the_cpu,
        check_stock_trainer_stops_recompiling,
    ],
}


def run_group(name: str) -> int:
    torch.set_num_threads(1)
    simulator().install(lazy=name != "eager")
    failures = 0
    for check in GROUPS[name]:
        try:
            check()
        except Exception:
            failures += 1
            print(f"--- {check.__name__}\n{traceback.format_exc()}")
    return failures


if __name__ == "__main__":
    failed = run_group(sys.argv[1])
    sys.stdout.flush()
    # An autograd thread that still lets go of its graph aborts in an interpreter that is being taken down.
    os._exit(failed)
