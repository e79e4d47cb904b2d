"""Devices are found by name, probed with a reason, and never replaced by another."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dropbp.device
from dropbp.device import (
    ACCELERATORS,
    BUILT_IN_DEVICES,
    Availability,
    Device,
    DeviceDefaults,
    available_devices,
    fork_rng,
    get_device,
    known_devices,
    model_device,
)
from dropbp.errors import DeviceError
from tests.common.engine_models import plain_batch, plain_net

MIB = 2**20


class ToyDevice:
    """A third party's device that can be used."""

    name = "toy"

    def __init__(self, index: int | None = None) -> None:
        self.index = index

    def is_available(self) -> Availability:
        return Availability(self.index != 7, "there is no toy 7")

    def synchronize(self) -> None: ...

    def step_boundary(self) -> None: ...

    def is_lazy(self) -> bool:
        return True

    def memory_allocated_bytes(self) -> int:
        return 1

    def max_memory_allocated_bytes(self) -> int:
        return 2

    def memory_limit_bytes(self) -> int:
        return 3

    def reset_peak_memory(self) -> None: ...

    def describe(self) -> dict[str, dropbp.device.JSON]:
        return {"name": self.name}

    def compile_count(self) -> int:
        return 0

    def generator_state(self) -> torch.Tensor:
        return torch.zeros(1)

    def set_generator_state(self, state: torch.Tensor) -> None: ...

    def defaults(self) -> DeviceDefaults:
        return DeviceDefaults(boundary="layer")

    def check_model(self, model: nn.Module) -> None: ...


def declare(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Let the entry points of the group be these alone."""
    points = [EntryPoint(name, value, "dropbp.backends") for name, value in values.items()]
    monkeypatch.setattr(dropbp.device, "entry_points", lambda group: points)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("toy_adapter")
    module.create_device = ToyDevice  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_adapter", module)
    declare(monkeypatch, toy="toy_adapter", toy_function="toy_adapter:create_device", cpu="toy_adapter")


# --- the registry


@pytest.mark.parametrize("name", ["cpu", "cuda", "hpu", "meta"])
def test_built_in_adapter_is_a_device_with_its_name(name: str) -> None:
    adapter = dropbp.device._factory(name)(None)
    assert isinstance(adapter, Device)
    assert adapter.name == name


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_device_can_be_a_name_or_a_torch_device(device: str | torch.device) -> None:
    assert get_device(device).name == "cpu"


def test_device_object_is_taken_as_it_is() -> None:
    toy = ToyDevice()
    assert get_device(toy) is toy


def test_unavailable_device_object_is_refused() -> None:
    with pytest.raises(DeviceError, match="there is no toy 7"):
        get_device(ToyDevice(7))


@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch is built with CUDA here")
def test_missing_device_is_refused_with_reason_and_known_devices() -> None:
    with pytest.raises(DeviceError, match=r"'cuda'.*built without CUDA or ROCm.*Known devices: cpu, cuda, hpu, meta, "):
        get_device("cuda")


def test_explicit_device_is_not_overridden_by_the_model() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    assert get_device("cpu", model).name == "cpu"


def test_unknown_device_is_refused_with_the_way_to_add_one() -> None:
    with pytest.raises(DeviceError, match=r"no adapter for device 'abacus'.*Known devices: cpu.*dropbp\.backends"):
        get_device("abacus")


@pytest.mark.parametrize("device", ["", "cuda:first", "cuda:-1"])
def test_what_is_not_a_device_name_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match="allowed is a name"):
        get_device(device)


def test_every_known_device_is_probed_and_every_refusal_has_a_reason() -> None:
    answers = available_devices()
    assert set(answers) == set(known_devices())
    assert answers["cpu"]
    assert all(answer.reason for answer in answers.values() if not answer)


@pytest.mark.usefixtures("toy")
def test_third_party_device_is_found_by_entry_point() -> None:
    assert known_devices() == (*BUILT_IN_DEVICES, *ACCELERATORS, "toy", "toy_function")
    assert isinstance(get_device("toy"), ToyDevice)
    assert isinstance(get_device("toy_function"), ToyDevice)
    with pytest.raises(DeviceError, match="there is no toy 7"):
        get_device("toy:7")


@pytest.mark.usefixtures("toy")
def test_third_party_cannot_take_a_built_in_name() -> None:
    assert not isinstance(get_device("cpu"), ToyDevice)


def test_adapter_that_cannot_be_loaded_is_named_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, broken="no_such_package_anywhere", wrong="sys:maxsize")
    with pytest.raises(DeviceError, match=r"'broken'.*no_such_package_anywhere"):
        get_device("broken")
    with pytest.raises(DeviceError, match=r"'wrong'.*is a int.*create_device"):
        get_device("wrong")
    answers = available_devices()
    assert answers["cpu"]
    assert not answers["broken"]


# --- the model's own device


def test_model_answers_with_the_device_of_its_first_parameter_that_holds_data() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert model_device(model) == torch.device("cpu")
    assert get_device(None, model).name == "cpu"


def test_model_all_on_meta_answers_meta() -> None:
    device = get_device(None, nn.Linear(2, 2, device="meta"))
    assert device.name == "meta"
    assert device.describe()["generation"] == "shapes without data"
    assert device.max_memory_allocated_bytes() == 0


def test_model_without_parameters_answers_with_its_buffers_or_the_default_device() -> None:
    model = nn.Module()
    assert model_device(model) == torch.get_default_device()
    model.register_buffer("positions", torch.zeros(2, device="meta"))
    assert model_device(model) == torch.device("meta")


def test_nothing_given_takes_the_default_device_of_torch() -> None:
    assert get_device().name == torch.get_default_device().type
    with torch.device("meta"):
        assert get_device().name == "meta"


# --- cpu


def test_cpu_peak_sees_memory_that_is_gone_and_can_be_reset() -> None:
    device = get_device("cpu")
    device.reset_peak_memory()
    before = device.max_memory_allocated_bytes()
    block = torch.ones(64 * MIB // 4)
    del block
    assert device.max_memory_allocated_bytes() - before > 48 * MIB
    device.reset_peak_memory()
    assert device.max_memory_allocated_bytes() - device.memory_allocated_bytes() < 16 * MIB


def test_cpu_peak_is_sampled_where_the_system_does_not_let_it_be_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = sys.modules[type(get_device("cpu")).__module__]
    monkeypatch.setattr(cpu, "reset_high_water", lambda: False)
    device = get_device("cpu")
    device.reset_peak_memory()
    assert device.describe()["peak_is"] == "5 ms samples"
    before = device.max_memory_allocated_bytes()
    block = torch.ones(64 * MIB // 4)
    time.sleep(0.2)
    del block
    assert device.max_memory_allocated_bytes() - before > 48 * MIB


def test_cpu_limit_is_the_lower_of_machine_and_control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = sys.modules[type(get_device("cpu")).__module__]
    unlimited, limited = tmp_path / "unlimited", tmp_path / "limited"
    unlimited.write_text("max\n")
    limited.write_text("1048576\n")
    monkeypatch.setattr(cpu, "_CGROUP_LIMITS", (unlimited, tmp_path / "none"))
    machine = get_device("cpu").memory_limit_bytes()
    assert machine > MIB
    monkeypatch.setattr(cpu, "_CGROUP_LIMITS", (unlimited, limited))
    assert get_device("cpu").memory_limit_bytes() == MIB


def test_cpu_generator_state_goes_there_and_back() -> None:
    device = get_device("cpu")
    state = device.generator_state()
    drawn = torch.rand(3)
    device.set_generator_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_compile_count_grows_with_each_graph_and_not_with_each_call() -> None:
    device = get_device("cpu")
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    compiled(torch.zeros(2))
    first = device.compile_count()
    compiled(torch.ones(2))
    assert device.compile_count() == first
    compiled(torch.zeros(3))
    assert device.compile_count() == first + 1


# --- cuda, with the driver's answers replaced


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Two GPUs of the A100 class, as far as PyTorch's Python functions go."""
    seen = types.SimpleNamespace(
        calls=[], fraction=1.0, states=[torch.arange(16, dtype=torch.uint8), torch.zeros(16).byte()]
    )
    properties = types.SimpleNamespace(
        name="NVIDIA A100-SXM4-80GB", major=8, minor=0, total_memory=80 * 1024**3, multi_processor_count=108
    )
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "get_allocator_backend": lambda: "native",
        "get_per_process_memory_fraction": lambda _: seen.fraction,
        "synchronize": lambda index: seen.calls.append(("synchronize", index)),
        "memory_allocated": lambda index: 5 + (index or 0),
        "max_memory_allocated": lambda index: 7 + (index or 0),
        "reset_peak_memory_stats": lambda index: seen.calls.append(("reset", index)),
        "get_rng_state": lambda index: seen.calls.append(("state of", index)) or seen.states[index],
        "set_rng_state": lambda state, index: seen.states.__setitem__(index, state),
    }
    for name, function in replaced.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return seen


def test_cuda_speaks_of_the_gpu_that_was_asked_for(gpus: types.SimpleNamespace) -> None:
    device = get_device("cuda:1")
    device.synchronize()
    device.reset_peak_memory()
    assert gpus.calls == [("synchronize", 1), ("reset", 1)]
    assert (device.memory_allocated_bytes(), device.max_memory_allocated_bytes()) == (6, 8)
    assert device.memory_limit_bytes() == 80 * 1024**3
    gpus.fraction = 0.5
    assert device.memory_limit_bytes() == 40 * 1024**3
    assert not device.is_lazy()


@pytest.mark.usefixtures("gpus")
def test_cuda_describes_its_class() -> None:
    description = get_device("cuda").describe()
    assert description["compute_capability"] == "8.0"
    assert description["a100_class_or_later"] is True
    assert description["devices"] == 2
    assert description["cuda"] == "12.8"


def test_rocm_is_named_as_such(monkeypatch: pytest.MonkeyPatch, gpus: types.SimpleNamespace) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    description = get_device("cuda").describe()
    assert (description["platform"], description["rocm"]) == ("ROCm", "7.0")
    assert description["a100_class_or_later"] is False
    assert description["allocator_settings"] == "expandable_segments:True"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="built with ROCm and finds no usable GPU"):
        get_device("cuda")
    with pytest.raises(DeviceError, match=r"no adapter for device 'rocm'.*calls AMD's GPUs 'cuda'"):
        get_device("rocm")


@pytest.mark.usefixtures("gpus")
def test_cuda_index_out_of_range_is_refused() -> None:
    with pytest.raises(DeviceError, match="there are 2 GPUs"):
        get_device("cuda:2")


def test_cuda_build_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, gpus: types.SimpleNamespace) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no usable GPU"):
        get_device("cuda")


class OnGpu(nn.Module):
    """A model whose tensors say that they are on the given devices; there is nothing else behind them."""

    def __init__(self, *devices: str) -> None:
        super().__init__()
        self.tensors = [types.SimpleNamespace(device=torch.device(device)) for device in devices]

    def parameters(self, recurse: bool = True) -> Any:
        return iter(self.tensors)


def test_a_name_without_an_index_means_the_gpu_that_the_model_is_on(gpus: types.SimpleNamespace) -> None:
    get_device("cuda", OnGpu("meta", "cuda:1")).synchronize()
    get_device("cuda:0", OnGpu("cuda:1")).synchronize()
    get_device("cuda", OnGpu("cpu")).synchronize()
    assert gpus.calls == [("synchronize", 1), ("synchronize", 0), ("synchronize", None)]


def test_random_state_is_read_and_put_back_on_the_gpus_of_the_model_alone(gpus: types.SimpleNamespace) -> None:
    host, other = torch.get_rng_state(), gpus.states[0]
    before = gpus.states[1].clone()
    with fork_rng(OnGpu("cpu", "cuda:1", "meta")):
        torch.rand(1)
        gpus.states[1] = torch.ones(16).byte()
    assert gpus.calls == [("state of", 1)]
    assert torch.equal(gpus.states[1], before) and gpus.states[0] is other and torch.equal(torch.get_rng_state(), host)


def graphed(module: nn.Module) -> nn.Module:
    """As `torch.cuda.make_graphed_callables` leaves a module: its forward is a function of that module of Python."""

    def replay(*_: object) -> None:
        raise AssertionError("replayed")

    module.forward = types.FunctionType(replay.__code__, {"__name__": "torch.cuda.graphs"})
    return module


def on_cuda(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> dropbp.Handle:
    """A model of the CPU, enabled with CUDA's adapter, which is told that it may."""
    device = dropbp.device._factory("cuda")(None)
    monkeypatch.setattr(type(device), "is_available", lambda self: Availability(True))
    return dropbp.enable(model, 0.5, device=device, masks="exact", example_inputs=plain_batch())


def test_modules_that_run_as_cuda_graphs_are_refused_before_and_after_enable(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = plain_net(), plain_net()
    graphed(before.blocks[0])
    with pytest.raises(DeviceError, match=r"'blocks\.0' runs as a CUDA graph.*repeat the mask.*handle\.fixed"):
        on_cuda(monkeypatch, before)
    with on_cuda(monkeypatch, after):
        graphed(after.blocks[0])
        with pytest.raises(DeviceError, match=r"'blocks\.0' runs as a CUDA graph"):
            after(plain_batch())


def test_a_captured_training_forward_is_refused_but_under_a_fixed_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_net()
    with on_cuda(monkeypatch, model) as handle:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(DeviceError, match=r"is being captured as a CUDA graph.*handle\.fixed"):
            model(plain_batch())
        with handle.fixed([True] * len(handle.branches)):
            model(plain_batch())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        model(plain_batch())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_cuda_on_a_real_gpu() -> None:
    device = get_device("cuda")
    device.reset_peak_memory()
    before = device.max_memory_allocated_bytes()
    block = torch.ones(MIB, device="cuda")
    del block
    assert device.max_memory_allocated_bytes() - before == 4 * MIB
    state = device.generator_state()
    drawn = torch.rand(3, device="cuda")
    device.set_generator_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


# --- every other device of PyTorch, with a stand-in for its module and for torch.accelerator


class Backend(types.SimpleNamespace):
    """What a backend puts into PyTorch as its module, at the least."""

    def __init__(self, **functions: Any) -> None:
        super().__init__(is_available=lambda: True, device_count=lambda: 2, **functions)


def put_in(monkeypatch: pytest.MonkeyPatch, name: str, module: Any, **accelerator: Any) -> None:
    """Let the module be the device's, and the device be PyTorch's accelerator with these functions."""
    monkeypatch.setattr(torch, name, module, raising=False)
    monkeypatch.setattr(PACKAGES_MODULE, "PACKAGES", {})
    found = types.SimpleNamespace(type=name)
    monkeypatch.setattr(torch, "accelerator", types.SimpleNamespace(current_accelerator=lambda: found, **accelerator))
    monkeypatch.setattr(torch, "device", lambda name, index=None: (name, index))


PACKAGES_MODULE = sys.modules[dropbp.device._factory("xpu")(None).__module__]


def test_every_device_that_transformers_and_accelerate_know_has_an_adapter() -> None:
    """A device that is not here is refused with what is missing, and never for lack of an adapter."""
    for name in (*ACCELERATORS, "cuda", "hpu", "cpu", "meta"):
        adapter = dropbp.device._factory(name)(None)
        assert isinstance(adapter, Device) and adapter.name == name
        availability = adapter.is_available()
        assert availability or name in availability.reason.lower() or "software" in availability.reason, name
    with pytest.raises(
        DeviceError, match=r"'npu' is not available here.*needs the package torch_npu, which is not installed"
    ):
        get_device("npu:1")


@pytest.mark.parametrize("name", sorted(set(ACCELERATORS) - {"xla"}))
def test_a_backend_with_statistics_tells_them_for_the_device_asked_for(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[Any] = []
    states = {1: torch.arange(3)}
    module = Backend(
        synchronize=lambda device: calls.append(("synchronize", device)),
        memory_allocated=lambda device: 5,
        max_memory_allocated=lambda device: 7,
        mem_get_info=lambda device: (10, 99),
        reset_peak_memory_stats=lambda device: calls.append(("reset", device)),
        get_rng_state=lambda device: states[device[1]],
        set_rng_state=lambda state, device: states.__setitem__(device[1], state),
        get_device_name=lambda device: "Model T",
    )
    put_in(monkeypatch, name, module)
    device = get_device(f"{name}:1")
    device.synchronize()
    device.reset_peak_memory()
    assert calls == [("synchronize", (name, 1)), ("reset", (name, 1))]
    assert (device.memory_allocated_bytes(), device.max_memory_allocated_bytes()) == (5, 7)
    assert device.memory_limit_bytes() == 99
    before = device.generator_state()
    states[1] = torch.zeros(3)
    device.set_generator_state(before)
    assert torch.equal(states[1], torch.arange(3))
    assert device.describe()["generation"] == "Model T" and device.describe()["devices"] == 2
    with pytest.raises(DeviceError, match="index 2 was asked for; the number of devices is 2"):
        get_device(f"{name}:2")


def test_what_a_backend_does_not_say_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """No statistics, no random state, and functions that are there and refuse."""

    def refuses(*_: object) -> int:
        raise RuntimeError("Allocator for musa is not a DeviceAllocator.")

    waited: list[Any] = []
    put_in(monkeypatch, "musa", Backend(), synchronize=waited.append, memory_allocated=refuses, get_memory_info=refuses)
    device = get_device("musa")
    device.synchronize()
    device.reset_peak_memory()
    assert len(waited) == 1
    assert device.memory_allocated_bytes() is device.max_memory_allocated_bytes() is device.memory_limit_bytes() is None
    assert device.generator_state().numel() == 0
    device.set_generator_state(device.generator_state())
    assert str(device.describe()["memory_is"]).startswith("not known")
    assert device.defaults() == DeviceDefaults() and not device.is_lazy()


def test_statistics_of_torch_accelerator_are_taken_where_the_module_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in(
        monkeypatch,
        "neuron",
        Backend(),
        synchronize=lambda device: None,
        memory_allocated=lambda device: 3,
        max_memory_allocated=lambda device: 4,
        get_memory_info=lambda device: (1, 8),
    )
    device = get_device("neuron:0")
    assert (device.memory_allocated_bytes(), device.max_memory_allocated_bytes()) == (3, 4)
    assert device.memory_limit_bytes() == 8


def test_functions_without_a_device_are_called_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Apple's GPUs, of which there is one."""
    module = Backend(synchronize=lambda: None, current_allocated_memory=lambda: 5, recommended_max_memory=lambda: 9)
    put_in(monkeypatch, "mps", module)
    device = get_device("mps:0")
    device.synchronize()
    assert (device.memory_allocated_bytes(), device.memory_limit_bytes()) == (5, 9)
    assert device.max_memory_allocated_bytes() is None


def test_xla_is_lazy_and_asked_through_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    made = {
        "torch_xla": types.SimpleNamespace(
            device_count=lambda: 1, sync=lambda: calls.append("sync"), device=lambda index: "xla:0", __version__="2.9"
        ),
        "torch_xla.core.xla_model": types.SimpleNamespace(
            wait_device_ops=lambda: calls.append("wait"),
            get_rng_state=lambda: 17,
            set_rng_state=lambda seed: calls.append(f"seed {seed}"),
            get_memory_info=lambda device: {"bytes_used": 5, "bytes_limit": 9},
        ),
        "torch_xla.debug.metrics": types.SimpleNamespace(metric_data=lambda name: (3, 0.5, ())),
    }
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(PACKAGES_MODULE, "find_spec", lambda name: object())
    device = get_device("xla")
    device.synchronize()
    device.set_generator_state(device.generator_state())
    assert calls == ["sync", "wait", "seed 17"]
    assert (device.memory_allocated_bytes(), device.memory_limit_bytes(), device.compile_count()) == (5, 9, 3)
    assert device.is_lazy() and device.defaults().boundary == "layer" and device.describe()["name"] == "xla"
    with pytest.raises(DeviceError, match="index 1 was asked for"):
        get_device("xla:1")


def test_a_device_that_another_package_adds_to_pytorch_is_known() -> None:
    result = run_python("""
        import types, torch
        from dropbp.device import available_devices, get_device, known_devices
        from dropbp.errors import DeviceError
        try:
            get_device("mychip")
        except DeviceError as error:
            assert "no adapter for device 'mychip'" in str(error), error
        torch.utils.rename_privateuse1_backend("mychip")
        try:
            get_device("mychip")
        except DeviceError as error:
            assert "has no module torch.mychip" in str(error), error
        chip = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
        torch._register_device_module("mychip", chip)
        assert "mychip" in known_devices() and available_devices()["mychip"]
        device = get_device("mychip:0")
        assert device.memory_allocated_bytes() is None and device.describe()["name"] == "mychip"
    """)
    assert result.returncode == 0, result.stderr


def test_a_model_trains_with_a_backend_that_says_little(monkeypatch: pytest.MonkeyPatch) -> None:
    device = dropbp.device._factory("xpu")(None)
    monkeypatch.setattr(type(device), "is_available", lambda self: Availability(True))
    model = plain_net()
    with dropbp.enable(model, 0.5, device=device, example_inputs=plain_batch()) as handle:
        model(plain_batch()).sum().backward()
        assert handle.device is device and handle.report()["forwards"] == 1


# --- hpu, with a habana_frameworks of a few lines, in a process of its own: it puts a module into torch

FAKE_HABANA = """
import sys, types, torch
from torch import nn
from dropbp.device import available_devices, get_device
from dropbp.errors import DeviceError

calls, state = [], {"lazy": True, "available": True, "rng": torch.arange(4)}

def module(name, source=None, **members):
    made = types.ModuleType(name)
    vars(made).update(members)
    exec(source or "", vars(made))
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, made)
    sys.modules[name] = made
    return made

class Metric:
    def stats(self):
        return [("TotalNumber", 11), ("TotalTime", 5), ("AvgTime", 0.5)]

GRAPHS = '''
from functools import wraps
import torch
def wrap_in_hpu_graph(module):
    original = module.forward
    @wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)
    module.forward = forward
    return module
class ModuleCacher(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        model.forward = self.forward
    def forward(self, *args):
        return args
'''
module("habana_frameworks", __path__=[])
module("habana_frameworks.torch", __path__=[])
module("habana_frameworks.torch.core", mark_step=lambda: calls.append("mark_step"))
module("habana_frameworks.torch.utils", __path__=[])
module("habana_frameworks.torch.utils.internal", is_lazy=lambda: state["lazy"])
module("habana_frameworks.torch.hpu.random".rpartition(".")[0], __path__=[],
    is_available=lambda: state["available"], device_count=lambda: 1, get_device_name=lambda: "GAUDI2",
    synchronize=lambda: calls.append("synchronize"), reset_peak_memory_stats=lambda: calls.append("reset"),
    memory_stats=lambda: {"Limit": 96 * 2**30, "InUse": 5, "MaxInUse": 7})
module("habana_frameworks.torch.hpu.random", get_rng_state=lambda: state["rng"],
    set_rng_state=lambda new: state.update(rng=new))
module("habana_frameworks.torch.hpu.metrics",
    metric_global=lambda name: Metric() if name == "graph_compilation" else None)
graphs = module("habana_frameworks.torch.hpu.graphs", GRAPHS)
torch.hpu = sys.modules["habana_frameworks.torch.hpu"]
hpu = get_device("hpu")
"""


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def on_fake_hpu(body: str) -> None:
    result = run_python(FAKE_HABANA + textwrap.dedent(body))
    assert result.returncode == 0, result.stderr


def test_hpu_step_boundary_marks_in_lazy_mode_alone() -> None:
    on_fake_hpu("""
        hpu.step_boundary()
        assert hpu.is_lazy() and calls == ["mark_step"], calls
        state["lazy"] = False
        hpu.step_boundary()
        assert not hpu.is_lazy() and calls == ["mark_step"], calls
    """)


def test_hpu_synchronize_launches_what_is_recorded_first() -> None:
    on_fake_hpu("""
        hpu.synchronize()
        assert calls == ["mark_step", "synchronize"], calls
    """)


def test_hpu_memory_generator_and_compilations_are_those_of_its_software() -> None:
    on_fake_hpu("""
        hpu.reset_peak_memory()
        assert calls == ["reset"]
        assert (hpu.memory_allocated_bytes(), hpu.max_memory_allocated_bytes()) == (5, 7)
        assert hpu.memory_limit_bytes() == 96 * 2**30
        assert hpu.compile_count() == 11
        before = hpu.generator_state()
        state["rng"] = None
        hpu.set_generator_state(before)
        assert torch.equal(state["rng"], torch.arange(4))
        description = hpu.describe()
        assert description["generation"] == "GAUDI2" and description["mode"] == "lazy", description
    """)


def test_hpu_defaults_keep_optimizer_semantics_in_both_modes() -> None:
    on_fake_hpu("""
        lazy = hpu.defaults()
        state["lazy"] = False
        eager = hpu.defaults()
        assert (lazy.boundary, eager.boundary) == ("layer", "none")
        assert lazy.fill == eager.fill == "none"
        assert lazy.group_parameters and not eager.group_parameters
    """)


def test_hpu_without_a_device_or_with_a_wrong_index_is_refused() -> None:
    on_fake_hpu("""
        for name, reason in (("hpu:1", "there are 1 devices"), ("hpu", "finds no device")):
            try:
                get_device(name)
            except DeviceError as error:
                assert reason in str(error), error
            else:
                raise AssertionError(name)
            state["available"] = False
    """)


def test_hpu_graphs_are_refused_with_the_module_and_the_reason() -> None:
    on_fake_hpu("""
        def refused(model):
            try:
                hpu.check_model(model)
            except DeviceError as error:
                return str(error)

        assert refused(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) is None
        inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        graphs.wrap_in_hpu_graph(inner[0])
        assert "module '0' runs as an HPU graph" in refused(inner)
        assert "would repeat the mask" in refused(inner)
        cached = nn.Sequential(nn.Linear(2, 2))
        graphs.ModuleCacher(cached)
        assert "'<model>'" in refused(cached)

        import functools
        rewrapped = graphs.wrap_in_hpu_graph(nn.Linear(2, 2))
        captured = rewrapped.forward
        @functools.wraps(captured)
        def outer(*args):
            return captured(*args)
        rewrapped.forward = outer
        assert "'<model>'" in refused(rewrapped)
    """)


def test_hpu_that_is_not_installed_says_so() -> None:
    result = run_python("""
        import sys
        sys.modules["habana_frameworks"] = None
        from dropbp.device import available_devices
        print(available_devices()["hpu"].reason)
    """)
    assert "Gaudi's software is not installed" in result.stdout, result.stderr


def test_hpu_whose_software_is_broken_says_how() -> None:
    result = run_python("""
        import sys, types
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "habana_frameworks":
                    raise OSError("libSynapse.so: no such file")
        sys.meta_path.insert(0, Broken())
        from dropbp.device import available_devices
        print(available_devices()["hpu"].reason)
    """)
    assert "cannot be imported" in result.stdout, result.stderr
    assert "libSynapse.so" in result.stdout


def test_importing_and_loading_adapters_touches_neither_gaudi_nor_dynamo() -> None:
    result = run_python("""
        import sys
        import dropbp.device, dropbp.memory, dropbp.lazy.grouping
        for name in dropbp.device.BUILT_IN_DEVICES:
            dropbp.device._factory(name)
        assert dropbp.device.get_device("cpu").compile_count() == 0
        heavy = ("habana_frameworks", "torch._dynamo", "torch._inductor", "transformers")
        print([name for name in heavy if name in sys.modules])
    """)
    assert result.stdout.strip() == "[]", result.stderr


def test_adapter_in_the_documentation_is_a_device() -> None:
    page = Path(__file__).parents[1].joinpath("docs", "devices.md").read_text(encoding="utf-8")
    source = page.partition("# my_package/xpu.py\n")[2].partition("```")[0]
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    device = namespace["create_device"](None)
    assert isinstance(device, Device)
    if not torch.xpu.is_available():
        with pytest.raises(DeviceError, match="sees no Intel GPU"):
            get_device(device)
