"""Trains tiny models on the simulated HPU and prints the counts: the process behind `recipes`.

`python -m dropbp.bench.recipes.worker '[{"trainer": "gaudi", ...}, ...]'`, in an environment that has the trainer. The
simulation is for the life of a process, so this one does nothing else; all cases are of one trainer.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dropbp.cli.models import with_lora

from ..common.reference_detach import DetachedBranches

Case = Mapping[str, Any]
MARK = "RESULT "
VOCABULARY = 64
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GRAPH_LIMIT = 1000  # of torch.compile; a graph beyond it would run uncompiled and uncounted


class Tokens(torch.utils.data.Dataset[Any]):
    """Token sequences that count upwards by three from some start."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + 3 * torch.arange(self.length)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases given as JSON."""
    cases = json.loads((sys.argv[1:] if argv is None else argv)[0])
    simulator = start(cases[0]["trainer"])
    for case in cases:
        sys.stdout.write(MARK + json.dumps(run_case(simulator, case)) + "\n")
        sys.stdout.flush()
    return 0


def start(trainer: str) -> Any:
    """Install the simulator before optimum-habana; import its model classes too, as its own examples do."""
    hpu_simulator = importlib.import_module("dropbp.backends.hpu_simulator")
    hpu_simulator.install(lazy=trainer != "compiled")
    if trainer == "gaudi":
        # it calls `pip` by name for versions; the one of this environment must come first
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

        adapt_transformers_to_gaudi()
    return hpu_simulator


def run_case(simulator: Any, case: Case) -> dict[str, Any]:
    """Train once; returns what each optimizer step compiled and launched, and the memory peak."""
    gc.collect()
    if case["trainer"] == "compiled":
        return _compiled(simulator, case)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, case)
        callback = dropping(case)
        if callback is not None:
            trainer.add_callback(callback)
        simulator.reset()
        trainer.train()
    report = simulator.report()
    return {
        "recompiles": [step.recompiles for step in report.steps],
        "launches": [step.launches for step in report.steps],
        "recipes": report.recipes,
        "peak_bytes": report.peak_bytes,
        "optimizer": type(trainer.optimizer.optimizer).__name__,
    }


def dropping(case: Case) -> Any:
    """The callback with the options of the case; None without dropping."""
    from transformers import TrainerCallback

    from dropbp.integrations.transformers import DropBPCallback

    if case["options"] is None:
        return None
    if case["design"] != "detach":
        return DropBPCallback(case["drop_rate"], calibrate_at=None, **case["options"])

    class Detach(TrainerCallback):  # type: ignore[misc]
        """The reference implementation's way."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.branches = DetachedBranches(kwargs["model"], case["drop_rate"])

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.branches.remove()

    return Detach()


def make_trainer(folder: str, case: Case) -> Any:
    """Transformers' own trainer in float32, or GaudiTrainer with bf16, fused AdamW and fused clipping."""
    common = {
        "output_dir": folder,
        "per_device_train_batch_size": case["batch_size"],
        "gradient_accumulation_steps": case["accumulation"],
        "max_steps": case["steps"],
        "logging_steps": case["steps"],
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    model, data = make_model(case), Tokens(case["sequence_length"])
    if case["trainer"] == "transformers":
        from transformers import Trainer, TrainingArguments

        return Trainer(model, TrainingArguments(**common), train_dataset=data)
    from optimum.habana import GaudiConfig, GaudiTrainer, GaudiTrainingArguments

    arguments = GaudiTrainingArguments(use_habana=True, use_lazy_mode=True, bf16=True, **common)
    config = GaudiConfig(use_fused_adam=True, use_fused_clip_norm=True, use_torch_autocast=True)
    return GaudiTrainer(model=model, args=arguments, gaudi_config=config, train_dataset=data)


def make_model(case: Case) -> nn.Module:
    """A small Llama, with adapters on all linear layers for LoRA."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=case["width"],
            intermediate_size=2 * case["width"],
            num_hidden_layers=case["layers"],
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
        )
    )
    if case["method"] == "full":
        return model
    return with_lora(model, 0, r=4, target_modules=LORA_MODULES, task_type=None)  # type: ignore[no-any-return]


def _compiled(simulator: Any, case: Case) -> dict[str, Any]:
    """Eager mode with `torch.compile(backend="hpu_backend")`, in a plain loop."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = GRAPH_LIMIT
    model = make_model(case).to("hpu").train()
    simulator.reset()
    with _compiled_dropping(model, case):
        counts = list(_graphs_by_step(simulator, model, case))
    report = simulator.report()
    return {
        "graphs": [now - before for before, now in zip([0, *counts], counts, strict=False)],
        "launches": [step.launches for step in report.steps],
        "peak_bytes": report.peak_bytes,
    }


def _compiled_dropping(model: nn.Module, case: Case) -> AbstractContextManager[Any]:
    """Branches dropped with the options of the case, and the model compiled."""
    import dropbp

    handle = dropbp.enable(model, case["drop_rate"], device="hpu", **case["options"])
    if case["scope"] == "region":
        dropbp.compile_blocks(handle, backend="hpu_backend")
    else:
        model.compile(backend="hpu_backend")
    return handle


def _graphs_by_step(simulator: Any, model: nn.Module, case: Case) -> Iterator[int]:
    """Train; yield after each step the number of graphs compiled so far."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = torch.utils.data.DataLoader(Tokens(case["sequence_length"]), case["batch_size"])
    for _, batch in zip(range(case["steps"]), data, strict=False):
        model(**{name: tensor.to("hpu") for name, tensor in batch.items()}, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield sum(simulator.compiled_graphs().values())


if __name__ == "__main__":
    sys.exit(main())
