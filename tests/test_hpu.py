"""DropBP on the simulated HPU: the numbers of the CPU, nothing compiled after the first steps, clear refusals.

The simulation is process-global, so each group of checks runs in a process of its own: this file, as a script.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

HERE = Path(__file__).resolve()
ROOT = HERE.parent.parent
SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = (2, 12)
LEARNING_RATE, DECAY, BETAS = 1e-3, 0.1, (0.9, 0.999)
EPSILON = 1e-6  # with less, Adam makes whole steps of the rounding errors in gradients that are nearly zero
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.timeout(600)  # the first one may have to build the extension


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)


def assert_group_passes(group: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    done = run_python(str(HERE), group)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lazy_training_has_the_numbers_of_the_cpu_and_compiles_nothing_late():
    assert_group_passes("lazy")


def test_blocks_compile_in_the_first_steps_in_eager_mode():
    assert_group_passes("eager")


def test_hpu_without_its_software_is_refused():
    done = run_python("-c", "import torch, dropbp; dropbp.enable(torch.nn.Linear(2, 2), device='hpu')")
    assert done.returncode != 0
    assert "DeviceError: device 'hpu' is not available here" in done.stderr
    assert "habana_frameworks" in done.stderr


# --- a training loop, the same on every device


def simulator() -> types.ModuleType:
    from dropbp.backends import hpu_simulator

    return hpu_simulator


def make_model(*, lora: bool = False, layers: int = 4) -> nn.Module:
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **SIZES, **HEADS))
    return get_peft_model(model, LoraConfig(r=4, target_modules=LORA_MODULES)) if lora else model


def batches(count: int, device: str, shape: tuple[int, int] = TOKENS) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randint(0, 64, shape, generator=generator).to(device)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


@contextmanager
def enabled(device: str, drop_rate: float, *, lora: bool = False, layers: int = 4, **options: Any) -> Iterator[Any]:
    import dropbp

    model = make_model(lora=lora, layers=layers).to(device).train()
    with dropbp.enable(model, drop_rate, device=device, **{"rehearse": True} | options) as handle:
        yield handle


def make_optimizer(handle: Any, *, grouped: bool = True) -> torch.optim.Optimizer:
    trained = [parameter for parameter in handle.model.parameters() if parameter.requires_grad]
    groups = handle.group_parameters() if grouped else trained
    return torch.optim.AdamW(groups, LEARNING_RATE, BETAS, EPSILON, DECAY, foreach=False)


def step(handle: Any, optimizer: torch.optim.Optimizer, micro_batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One optimizer step as a lazy device likes it. Nothing is read back to the host."""
    from dropbp.lazy.grouping import clip_grad_norm_grouped, step_by_group

    boundary, losses = handle.device.step_boundary, []
    for tokens in micro_batches:
        loss = loss_of(handle.model, tokens)
        loss.backward()
        boundary()
        losses.append(loss.detach())
    groups = [group["params"] for group in optimizer.param_groups]
    clip_grad_norm_grouped(groups, 1.0, step_boundary=boundary)
    step_by_group(optimizer, boundary)
    optimizer.zero_grad()
    boundary()
    return losses


def train(
    device: str,
    drop_rate: float,
    steps: int,
    *,
    accumulation: int = 1,
    grouped: bool = True,
    shape: tuple[int, int] = TOKENS,
    **options: Any,
) -> list[torch.Tensor]:
    with enabled(device, drop_rate, **options) as handle:
        optimizer = make_optimizer(handle, grouped=grouped)
        data = list(batches(steps * accumulation, device, shape))
        if device == "hpu":
            simulator().reset()
        parts = [data[i : i + accumulation] for i in range(0, len(data), accumulation)]
        return [loss for part in parts for loss in step(handle, optimizer, part)]


def recompiles(drop_rate: float, steps: int = 24, **options: Any) -> tuple[list[int], Any]:
    """Per optimizer step, and the simulator's report."""
    train("hpu", drop_rate, steps, **options)
    report = simulator().report()
    assert len(report.steps) == steps
    return [each.recompiles for each in report.steps], report


# --- lazy: numbers


def check_losses_are_those_of_the_cpu() -> None:
    """With rates of its own: what a branch saves, and so its rate, depends on whether the device can end the stream."""
    rates = (0.95, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0, 0.0)
    for lora in (False, True):
        for masks, accumulation in (("nested", 2), ("exact", 1)):
            options: dict[str, Any] = {"lora": lora, "masks": masks, "accumulation": accumulation}
            options |= {"rates": rates} if masks == "nested" else {}
            here, there = (torch.stack(train(device, 0.5, 6, **options)).cpu() for device in ("hpu", "cpu"))
            torch.testing.assert_close(here, there, **CLOSE)


def check_gradients_are_those_of_the_cpu() -> None:
    mask = (True, False, False, True, True, True, False, False)
    for scaling in ("none", "unbiased"):
        found = [gradients_under(device, mask, scaling) for device in ("hpu", "cpu")]
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            other = found[1][name]
            assert (gradient is None) == (other is None), name
            assert gradient is None or (gradient - other).norm() <= 1e-6 * other.norm(), name


def gradients_under(device: str, mask: Sequence[bool], scaling: str) -> Mapping[str, torch.Tensor | None]:
    with enabled(device, 0.5, masks="independent", scaling=scaling) as handle, handle.fixed(mask):
        loss_of(handle.model, next(batches(1, device))).backward()
        grads = {name: parameter.grad for name, parameter in handle.model.named_parameters()}
        return {name: None if grad is None else grad.cpu() for name, grad in grads.items()}


def check_boundaries_change_no_number() -> None:
    none, layer, sublayer = (torch.stack(train("hpu", 0.5, 6, boundary=b)) for b in ("none", "layer", "sublayer"))
    assert torch.equal(none, layer)
    torch.testing.assert_close(none, sublayer, **CLOSE)  # a gradient of three parts is added in another order


def check_fill_decides_whether_skipped_parameters_move() -> None:
    """Under `none` they stay; under `zero` AdamW decays them and moves them along their momentum."""
    for fill in ("none", "zero"):
        with enabled("hpu", 0.5, layers=2, fill=fill) as handle:
            weight = handle.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
            optimizer = make_optimizer(handle)
            first, second = batches(2, "hpu")
            with handle.fixed((False,) * 4):
                step(handle, optimizer, [first])
            before, moments = weight.detach().cpu(), moments_of(optimizer, weight)
            with handle.fixed((True, True, False, False)):
                step(handle, optimizer, [second])
            expected = before if fill == "none" else after_zero_gradient(before, *moments)
            torch.testing.assert_close(weight.detach().cpu(), expected, rtol=0, atol=0 if fill == "none" else 1e-7)
            assert moments_of(optimizer, weight)[2] == (1 if fill == "none" else 2)


def moments_of(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    state = optimizer.state[weight]
    return state["exp_avg"].cpu().clone(), state["exp_avg_sq"].cpu().clone(), int(state["step"])


def after_zero_gradient(weight: torch.Tensor, first: torch.Tensor, second: torch.Tensor, steps: int) -> torch.Tensor:
    """AdamW's second step for a gradient of zeros, written out (Loshchilov and Hutter, algorithm 2)."""
    corrected_first = BETAS[0] * first / (1 - BETAS[0] ** (steps + 1))
    corrected_second = BETAS[1] * second / (1 - BETAS[1] ** (steps + 1))
    return weight * (1 - LEARNING_RATE * DECAY) - LEARNING_RATE * corrected_first / (corrected_second.sqrt() + EPSILON)


def check_hpu_graphs_are_refused_with_the_reason() -> None:
    import dropbp
    from dropbp.errors import DeviceError

    def replay(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("never called")

    model = make_model(layers=2).to("hpu")
    module = {"__name__": "habana_frameworks.torch.hpu.graphs"}  # where the real wrapper's functions live
    model.model.forward = types.FunctionType(replay.__code__, module)
    with pytest.raises(
        DeviceError, match=r"'model' runs as an HPU graph.*repeat the mask.*use_hpu_graphs_for_training"
    ):
        dropbp.enable(model, device="hpu")


def check_a_cpu_model_is_not_taken_for_an_hpu_model() -> None:
    import dropbp

    with dropbp.enable(make_model(layers=2), 0.5) as handle:
        assert handle.device.name == "cpu"
    with dropbp.enable(make_model(layers=2).to("hpu"), 0.5) as handle:
        assert handle.device.name == "hpu" and handle.device.is_lazy()


def check_calibration_leaves_the_random_state_alone_where_there_are_eight_devices() -> None:
    import dropbp

    hpu = torch.get_device_module("hpu")
    assert hpu.device_count() == 8
    tokens = next(batches(1, "hpu"))
    for method in ("one-pass", "exact"):
        model = make_model(lora=True, layers=2).to("hpu").train()
        before = hpu.get_rng_state(), torch.get_rng_state()
        with dropbp.enable(model, 0.5, device="hpu", masks="exact") as handle:
            handle.calibrate(lambda model=model: loss_of(model, tokens), method=method)
        assert all(map(torch.equal, before, (hpu.get_rng_state(), torch.get_rng_state()))), method


def check_the_adapter_of_every_other_device_serves_a_real_one() -> None:
    """It knows nothing of Gaudi, and finds in `torch.hpu` and `torch.accelerator` all that it asks for."""
    import dropbp

    generic = importlib.import_module("dropbp.backends.accelerator")
    device = generic.create_device("hpu", 0)
    assert device.is_available() and not generic.create_device("hpu", 8).is_available()
    device.reset_peak_memory()
    before = device.memory_allocated_bytes()
    tensor = torch.ones(1024, device="hpu")
    device.synchronize()
    assert device.memory_allocated_bytes() - before == tensor.nbytes <= device.max_memory_allocated_bytes()
    assert device.memory_limit_bytes() == 96 * 2**30
    state, first = device.generator_state(), torch.rand(3, device="hpu")
    device.set_generator_state(state)
    assert torch.equal(torch.rand(3, device="hpu").cpu(), first.cpu())
    described = device.describe()
    assert (described["generation"], described["devices"], described["package"]) == ("GAUDI2", 8, None)
    with dropbp.enable(make_model(layers=2).to("hpu").train(), 0.5, device=device) as handle:
        loss_of(handle.model, next(batches(1, "hpu"))).backward()
        assert handle.report()["forwards"] == 1


# --- lazy: recipes, host reads, memory


def check_no_recompile_after_warm_up() -> None:
    for lora, drop_rate, masks in (
        (False, 0.5, "independent"),
        (False, 0.875, "nested"),
        (True, 0.5, "nested"),
        (True, 0.875, "exact"),
    ):
        counts, _ = recompiles(drop_rate, lora=lora, masks=masks)
        assert sum(counts[10:]) == 0, (lora, drop_rate, masks, counts)
    counts, _ = recompiles(0.5, accumulation=2)
    assert sum(counts[12:]) == 0, counts


def check_recipes_do_not_depend_on_depth() -> None:
    found = {layers: recompiles(0.5, layers=layers)[1].recipes for layers in (4, 8)}
    assert found[4] == found[8], found


def check_what_each_part_of_the_design_is_for() -> None:
    """Random masks compile for ever without marks, and, by optimizer and clipping, without groups or zeros."""
    base = {"masks": "independent", "rehearse": False}
    naive, whole = recompiles(0.5, **base, boundary="none", grouped=False)
    marked, _ = recompiles(0.5, **base, boundary="layer", grouped=False)
    assert sum(naive[12:]) > sum(marked[12:]) > 0, (naive, marked)
    filled, zero = recompiles(0.5, **base, boundary="layer", grouped=False, fill="zero")
    _, layer = recompiles(0.5, masks="independent", boundary="layer")
    finer, sublayer = recompiles(0.5, masks="independent", boundary="sublayer")
    assert sum(filled[12:]) == sum(finer[12:]) == 0, (filled, finer)
    launches = [report.launches_per_step for report in (whole, zero, layer, sublayer)]
    assert launches == sorted(launches), launches


def check_masks_are_drawn_without_asking_the_device() -> None:
    """The host waits as often as without DropBP: once in each forward, in the model's own code."""
    _, report = recompiles(0.5, steps=8)
    simulator().reset()
    loss_of(make_model().to("hpu").train(), next(batches(1, "hpu"))).backward()
    plain = simulator().counters()
    assert {each.host_reads for each in report.steps} == {plain["host_reads"]}
    assert set(report.flushes) == {"mark_step", *plain["flushes"]}, report.flushes


def check_peak_memory_falls_as_the_drop_rate_rises() -> None:
    for masks in ("nested", "exact"):
        peaks = []
        for drop_rate in (0.0, 0.5, 0.875):
            with enabled("hpu", drop_rate, layers=6, masks=masks, max_activations=None, rehearse=False) as handle:
                peaks.append(mean_peak_bytes(handle))
        assert peaks[0] > 1.2 * peaks[1] and peaks[1] > 1.2 * peaks[2], (masks, peaks)


def mean_peak_bytes(handle: Any) -> float:
    """Mean over masks of the most that a forward and its backward need, above what is there before."""
    hpu, total = torch.get_device_module("hpu"), 0
    data = list(batches(12, "hpu", (4, 32)))
    for tokens in data:
        hpu.reset_peak_memory_stats()
        before = hpu.memory_allocated()
        loss_of(handle.model, tokens).backward()
        handle.model.zero_grad()
        total += hpu.max_memory_allocated() - before
    return total / len(data)


# --- the trainer of transformers


class Tokens(torch.utils.data.Dataset[Any]):
    """Counting upwards by three from somewhere."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + 3 * torch.arange(TOKENS[1])) % 64
        return {"input_ids": tokens, "labels": tokens}


def check_stock_trainer_compiles_nothing_late() -> None:
    for lora, accumulation, drop_rate, masks in ((False, 2, 0.875, "nested"), (True, 1, 0.5, "independent")):
        counts, callback = stock_training(110, accumulation, drop_rate, lora=lora, masks=masks)
        assert len(counts) == 110 and sum(counts[10:]) == 0, counts
        assert abs(callback.report()["realised_drop_rate"] - drop_rate) < 0.05


def stock_training(steps: int, accumulation: int, drop_rate: float, *, lora: bool, masks: str) -> tuple[list[int], Any]:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from dropbp.integrations.transformers import DropBPCallback

    callback = DropBPCallback(drop_rate, masks=masks, calibrate_at=None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=TOKENS[0],
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            logging_steps=4,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(make_model(lora=lora, layers=3), arguments, train_dataset=Tokens(), callbacks=[callback])
        assert trainer.args.device.type == "hpu"
        trainer.remove_callback(PrinterCallback)
        simulator().reset()
        trainer.train()
    return [each.recompiles for each in simulator().report().steps], callback


# --- eager


def check_eager_needs_no_boundary() -> None:
    with enabled("hpu", 0.5, layers=2) as handle:
        assert not handle.device.is_lazy()
        assert not any("_dropbp_boundary" in vars(module) for module in handle.model.modules())


def check_blocks_compile_in_the_first_steps() -> None:
    """All graphs in the first steps, no more for a deeper model, and the losses of the CPU."""
    found = {layers: compiled_training(layers) for layers in (3, 6)}
    for layers, (graphs, losses) in found.items():
        assert graphs[7] == graphs[-1] > 0, graphs
        expected = [loss.item() for loss in train("cpu", 0.5, len(losses), layers=layers)]
        torch.testing.assert_close(losses, expected, **CLOSE)
    assert found[3][0][-1] == found[6][0][-1], found


def compiled_training(layers: int, steps: int = 14) -> tuple[list[int], list[float]]:
    """Graphs handed over so far after each step, and losses."""
    import dropbp

    torch._dynamo.reset()
    with enabled("hpu", 0.5, layers=layers) as handle:
        dropbp.compile_blocks(handle, backend="hpu_backend")
        simulator().reset()
        optimizer, graphs, losses = make_optimizer(handle), [], []
        for tokens in batches(steps, "hpu"):
            losses += [loss.item() for loss in step(handle, optimizer, [tokens])]
            graphs.append(sum(simulator().compiled_graphs().values()))
    return graphs, losses


GROUPS = {
    "lazy": [
        check_losses_are_those_of_the_cpu,
        check_gradients_are_those_of_the_cpu,
        check_boundaries_change_no_number,
        check_fill_decides_whether_skipped_parameters_move,
        check_hpu_graphs_are_refused_with_the_reason,
        check_a_cpu_model_is_not_taken_for_an_hpu_model,
        check_calibration_leaves_the_random_state_alone_where_there_are_eight_devices,
        check_the_adapter_of_every_other_device_serves_a_real_one,
        check_no_recompile_after_warm_up,
        check_recipes_do_not_depend_on_depth,
        check_what_each_part_of_the_design_is_for,
        check_masks_are_drawn_without_asking_the_device,
        check_peak_memory_falls_as_the_drop_rate_rises,
        check_stock_trainer_compiles_nothing_late,
    ],
    "eager": [check_eager_needs_no_boundary, check_blocks_compile_in_the_first_steps],
}


def run_group(name: str) -> int:
    torch.set_num_threads(1)
    simulator().install(lazy=name != "eager")
    failures = 0
    for check in GROUPS[name]:
        begin_s = time.perf_counter()
        try:
            check()
        except Exception:
            failures += 1
            print(f"--- {check.__name__}\n{traceback.format_exc()}")
        print(f"{check.__name__} {time.perf_counter() - begin_s:.1f} s")
    return failures


if __name__ == "__main__":
    sys.exit(run_group(sys.argv[1]))
