"""DropBP in the unmodified GaudiTrainer on the simulated HPU; print what happened, one JSON line for each run.

Run as a script in a process of its own: `python -m tests.gaudi.dropbp_run lora depth`. Many runs share the process,
because importing optimum-habana takes longer than a run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.gaudi.gaudi_run import Tokens, make_model, make_trainer, start

Result = dict[str, Any]


def train(
    simulator: Any,
    *,
    drop_rate: float,
    lora: bool,
    layers: int = 6,
    accumulation: int = 1,
    steps: int = 110,
    **options: Any,
) -> Result:
    """One training with the callback; the counts of the simulator."""
    from dropbp.integrations.transformers import DropBPCallback

    callback = DropBPCallback(drop_rate, calibrate_at=None, **options)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(lora=lora, layers=layers)
        trainer = make_trainer(folder, model, accumulation=accumulation, steps=steps, logging_steps=4)
        trainer.add_callback(callback)
        simulator.reset()
        trainer.train()
    report = simulator.report()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "recipes": report.recipes,
        "recompiles": [step.recompiles for step in report.steps],
        "launches_per_step": report.launches_per_step,
        "peak_bytes": report.peak_bytes,
        "losses": losses,
        "realised_drop_rate": callback.report()["realised_drop_rate"],
        "put_back": "clip_grad_norm_" not in vars(trainer.accelerator),
        "optimizer": type(trainer.optimizer.optimizer).__name__,
    }


CASES = (
    {"drop_rate": 0.5, "masks": "nested"},
    {"drop_rate": 0.875, "masks": "nested"},
    {"drop_rate": 0.5, "masks": "independent"},
    {"drop_rate": 0.875, "masks": "exact"},
    {"drop_rate": 0.5, "masks": "nested", "accumulation": 2},
    {"drop_rate": 0.75, "masks": "independent", "accumulation": 2},
)


def full(simulator: Any) -> Iterator[Result]:
    """Every parameter trains: default masks and random ones, both accumulations."""
    for case in CASES:
        yield case | train(simulator, lora=False, **case)


def lora(simulator: Any) -> Iterator[Result]:
    """The same with adapters."""
    for case in CASES:
        yield case | train(simulator, lora=True, **case)


def depth(simulator: Any) -> Iterator[Result]:
    """The same at three depths."""
    for method in (False, True):
        for layers in (6, 16, 32):
            case = {"lora": method, "layers": layers, "drop_rate": 0.5, "steps": 30}
            yield case | train(simulator, **case)


def subclass(simulator: Any) -> Iterator[Result]:
    """`DropBPGaudiTrainer` does what the callback does, and refuses HPU graphs before anything is trained."""
    from dropbp.errors import ConfigError
    from dropbp.integrations.optimum_habana import DropBPGaudiTrainer

    def trainer(folder: str, **options: Any) -> Any:
        more = {"drop_rate": 0.75, "dropbp_options": {"masks": "exact", "calibrate_at": None}}
        return make_trainer(folder, make_model(lora=True), kind=DropBPGaudiTrainer, more=more, **options)

    with tempfile.TemporaryDirectory() as folder:
        made = trainer(folder, steps=40)
        simulator.reset()
        made.train()
        try:
            trainer(folder, use_hpu_graphs_for_training=True)
        except ConfigError as error:
            refusal = str(error)
    yield {
        "name": type(made).__name__,
        "recompiles": [step.recompiles for step in simulator.report().steps],
        "realised_drop_rate": made.dropbp.report()["realised_drop_rate"],
        "refusal": refusal,
    }


def resume(simulator: Any) -> Iterator[Result]:
    """A run and its continuation from half-way, with the branches' own counts of optimizer steps."""
    from dropbp.integrations.transformers import DropBPCallback

    del simulator

    def trainer(folder: str, **options: Any) -> Any:
        made = make_trainer(folder, make_model(lora=True), steps=32, logging_steps=1, **options)
        made.add_callback(DropBPCallback(0.5, masks="exact"))
        return made

    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(folder, save_strategy="steps", save_steps=16)
        whole.train()
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-16")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    yield {"difference": max((a.cpu() - b.cpu()).abs().max().item() for a, b in pairs)}


def layers(simulator: Any) -> Iterator[Result]:
    """Gaudi's own layers, found and dropped: against the same model with the outputs of branches detached."""
    import dropbp

    del simulator
    from optimum.habana.transformers.models.llama import modeling_llama
    from optimum.habana.transformers.models.mistral import modeling_mistral

    # Without the fused kernel, which is not simulated, Mistral's rotary embedding cannot run; Llama's can.
    modeling_mistral.apply_customized_rope = modeling_llama.apply_customized_rope
    batch = {k: v.to("hpu") for k, v in torch.utils.data.default_collate([Tokens()[0], Tokens()[1]]).items()}
    for architecture in ("Llama", "Mistral", "Qwen2"):
        model = make_model(lora=False, layers=3, architecture=architecture).to("hpu").train()
        plain_loss = model(**batch).loss
        with dropbp.enable(model, 0.5, device="hpu") as handle:
            mask = (False, True, True, False, True, True)
            with handle.fixed(mask):
                loss, gradients = backward(model, batch)
            names = [branch.name for branch in handle.branches]
        with detached(model, mask):
            _, expected = backward(model, batch)
        yield {
            "architecture": architecture,
            "layer": type(model.model.layers[0]).__name__,
            "branches": names,
            "forward_equal": bool(torch.equal(loss.cpu(), plain_loss.cpu())),
            "without_gradient": sorted(name for name, gradient in gradients.items() if gradient is None),
            "expected_without": sorted(name for name, gradient in expected.items() if gradient is None),
            "largest_difference": max(
                (gradient - expected[name]).abs().max().item()
                for name, gradient in gradients.items()
                if gradient is not None
            ),
            "trained": sum(gradient is not None for gradient in gradients.values()),
        }


def backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: None if p.grad is None else p.grad.cpu() for n, p in model.named_parameters()}


class detached:
    """The reference: the last projection of each dropped branch gives out its result detached."""

    def __init__(self, model: Any, mask: tuple[bool, ...]) -> None:
        ends = [end for layer in model.model.layers for end in (layer.self_attn.o_proj, layer.mlp.down_proj)]
        self.ends = [end for end, dropped in zip(ends, mask, strict=True) if dropped]

    def __enter__(self) -> None:
        self.hooks = [end.register_forward_hook(lambda module, args, output: output.detach()) for end in self.ends]

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


PARTS: dict[str, Callable[[Any], Iterator[Result]]] = {
    part.__name__: part for part in (full, lora, depth, subclass, resume, layers)
}


def main() -> None:
    simulator = start()
    for name in sys.argv[1:]:
        for result in PARTS[name](simulator):
            print("RESULT " + json.dumps({"part": name} | result), flush=True)


if __name__ == "__main__":
    main()
