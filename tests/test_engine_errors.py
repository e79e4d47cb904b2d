"""Bad input: what is refused, with which words, and that nothing is changed by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dropbp
from dropbp.errors import ConfigError, DeviceError, DropBPError, StateError
from tests.common.engine_models import plain_batch, plain_loss, plain_net, tiny_llama


def enable(model=None, *args, **options):
    return dropbp.enable(plain_net() if model is None else model, *args, example_inputs=plain_batch(), **options)


@pytest.mark.parametrize("drop_rate", [-0.1, 1, 1.0, 2, float("nan"), float("inf"), True, "0.5", None, [0.5]])
def test_a_drop_rate_outside_of_its_range_is_refused(drop_rate):
    message = r"drop_rate is .*; it is the share of backward FLOPs to skip, 0 <= drop_rate < 1"
    with pytest.raises(ConfigError, match=message):
        enable(None, drop_rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": "random"}, "masks is 'random'; allowed: cyclic, exact, independent, nested, pool"),
        ({"masks": 3}, "masks is 3; allowed: "),
        ({"scaling": "full"}, "scaling is 'full'; allowed: none, unbiased, clipped"),
        ({"resample": "epoch"}, "resample is 'epoch'; allowed: 'forward', 'step'"),
        ({"resample": 0}, "resample is 0; allowed"),
        ({"resample": True}, "resample is True; allowed"),
        ({"resample": 1.5}, "resample is 1.5; allowed"),
        ({"resample": ["step"]}, "resample is .*; allowed"),
        ({"seed": 1.5}, "seed is 1.5; it must be an integer"),
        ({"seed": True}, "seed is True; it must be an integer"),
        ({"warmup": -1}, "warmup is -1; it must be a whole number of training forwards, at least 0"),
        ({"steps": 0}, "steps is 0; it must be the number of training forwards of the run, at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be the number of training forwards of the run, at least 1"),
        ({"warmup": 2.5}, "warmup is 2.5; it must be a whole number of training forwards, at least 0"),
        ({"max_scale": 0.5}, "max_scale is 0.5; it must be a number of at least 1"),
        ({"max_scale": float("nan")}, "max_scale is nan; it must be a number"),
        ({"max_rate": 1.5}, "max_rate is 1.5; it must be a number from 0 to 1, or None"),
        ({"max_rate": "high"}, "max_rate is 'high'; it must be a number"),
        ({"boundary": "block"}, "boundary is 'block'; allowed: auto, none, layer, sublayer"),
        ({"fill": 0}, "fill is 0; allowed: auto, none, zero"),
        ({"rates": "steep"}, "rates is 'steep'; allowed: auto, uniform"),
        ({"rates": [0.5]}, "rates has 1 entries and flops has 6"),
        ({"rates": 0.5}, "rates is 0.5; allowed: one of auto, uniform"),
        ({"rates": [0.5] * 5 + ["x"]}, "rates"),
        (
            {"scalling": "none"},
            "unknown option 'scalling'; options are activation_cache, activation_cache_limit, boundary, fill,",
        ),
        ({"pool_size": 4}, "unknown option 'pool_size'"),
        ({"masks": "pool", "pool_size": 0}, "pool_size"),
        ({"masks": "pool", "poolsize": 4}, "unknown option 'poolsize'.*and .*pool_size.* for masks='pool'"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options, message):
    model = plain_net()
    with pytest.raises(ConfigError, match=message):
        enable(model, **options)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("model", [None, 3, "model", plain_net, torch.zeros(3)])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(ConfigError, match=r"model is \w+; dropbp.enable takes a torch.nn.Module"):
        dropbp.enable(model)


def test_an_enabled_model_its_parts_and_what_holds_it_are_refused():
    model = plain_net()
    handle = enable(model)
    for again in (model, model.blocks, nn.Sequential(model), torch.compile(model, backend="eager")):
        with pytest.raises(StateError, match=r"is already enabled. Change it through its handle"):
            dropbp.enable(again, example_inputs=plain_batch())
    handle.remove()
    enable(model).remove()


@pytest.mark.parametrize(
    ("wrapper", "advice"),
    [
        ("DataParallel", "It copies the model in each forward"),
        ("DistributedDataParallel", "Enable the model inside"),
        ("FullyShardedDataParallel", "Enable the model before wrapping it"),
    ],
)
def test_wrapped_models_are_refused(wrapper, advice, tmp_path):
    model = plain_net()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(StateError, match=f"wrapped in {wrapper}. {advice}"):
            dropbp.enable(_wrapped(model, wrapper), example_inputs=plain_batch())
    finally:
        torch.distributed.destroy_process_group()
    enable(model)


def _wrapped(model, wrapper):
    if wrapper == "DataParallel":
        return nn.DataParallel(model)
    if wrapper == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(model)
    fsdp = type("FullyShardedDataParallel", (nn.Module,), {})()
    fsdp.module = model  # the real one wants an accelerator
    return fsdp


def test_a_model_enabled_before_it_is_wrapped_trains_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = plain_net()
        handle = enable(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(5):
            model.zero_grad()
            plain_loss(wrapped).backward()
        dropped = [name for b, drop in zip(handle.branches, handle.mask, strict=True) if drop for name in b.modules]
        parameters = [p for name in dropped for p in model.get_submodule(name).parameters()]
        assert all(p.grad is None or not p.grad.any() for p in parameters)
    finally:
        torch.distributed.destroy_process_group()


def test_an_unknown_device_is_refused():
    with pytest.raises(DeviceError, match=r"no adapter for device 'abacus'. Known devices: cpu, cuda, hpu"):
        enable(device="abacus")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available here")
def test_an_unavailable_device_is_refused_and_not_replaced():
    model = plain_net()
    with pytest.raises(DeviceError, match="device 'cuda' is not available here: "):
        enable(model, device="cuda")
    assert "forward" not in model.__dict__


def test_a_device_that_cannot_train_the_model_is_asked_before_anything_is_done():
    from dropbp.device import get_device

    class Picky(type(get_device("cpu"))):
        def check_model(self, model):
            raise DeviceError("this device cannot train captured graphs")

    model = plain_net()
    with pytest.raises(DeviceError, match="cannot train captured graphs"):
        enable(model, device=Picky())
    assert "forward" not in model.__dict__


def test_a_model_with_everything_frozen_is_refused():
    with pytest.raises(
        StateError, match="No parameter of PlainNet requires a gradient, so there is no backward to skip"
    ):
        enable(plain_net().requires_grad_(False))


def test_a_model_frozen_after_enable_is_as_the_plain_one():
    model = plain_net()
    handle = enable(model)
    model.requires_grad_(False)
    with handle.fixed([True] * 6):
        assert not plain_loss(model).requires_grad


def test_a_handle_that_was_removed_says_so_or_does_nothing():
    model = plain_net()
    handle = enable(model)
    handle.remove()
    with pytest.raises(StateError, match=r"This handle was removed from its model. Call dropbp.enable"):
        handle.calibrate(lambda: plain_loss(model))
    with handle.fixed([True] * 6):  # harmless: no forward asks it any more
        plain_loss(model).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert handle.report()["forwards"] == 0 and handle.branches[0].name == "blocks.0.mix"
    assert not handle.enabled


def test_branches_are_values_that_cannot_be_changed():
    handle = enable()
    with pytest.raises(AttributeError):
        handle.branches[0].flops = 3
    plain_loss(handle.model)
    with pytest.raises(TypeError):
        handle.mask[0] = True


def test_every_error_has_one_root():
    for call in (lambda: enable(None, 2), lambda: enable(device="abacus"), lambda: dropbp.enable(3)):
        with pytest.raises(DropBPError):
            call()


def test_a_branch_called_outside_of_the_roots_forward_is_warned_about_once(caplog):
    model = tiny_llama()
    handle = dropbp.enable(model)
    with handle.fixed((True,) * 4):
        for _ in range(2):
            model.model.layers[0].mlp(torch.ones(2, 3, 16)).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad is not None
    messages = [record.message for record in caplog.records if "outside the forward of the model" in record.message]
    assert len(messages) == 1 and "Enable the module whose forward your training loop calls" in messages[0]
