"""Train a small Llama with the unmodified GaudiTrainer on the simulated HPU; print what happened as JSON.

Run as a script in a process of its own: `python -m tests.gaudi.gaudi_run --lora --accumulation 2`. Its parts serve
other tests too: call `start()` before anything imports transformers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def start(*, lazy: bool = True, adapt: bool = True) -> Any:
    """The simulator, installed; optimum-habana's model classes put in place of transformers', as its examples do."""
    from dropbp.backends import hpu_simulator

    hpu_simulator.install(lazy=lazy)
    if adapt:
        from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

        adapt_transformers_to_gaudi()
    return hpu_simulator


class Tokens(torch.utils.data.Dataset):
    """Counting upwards by three from somewhere: learnt in a few steps."""

    def __init__(self, size: int = 1024, length: int = 12) -> None:
        self.size, self.length = size, length

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + 3 * torch.arange(self.length)) % SIZES["vocab_size"]
        return {"input_ids": tokens, "labels": tokens}


def make_model(*, lora: bool, layers: int = 4, architecture: str = "Llama") -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(num_hidden_layers=layers, **SIZES, **HEADS)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=LORA_MODULES, lora_dropout=0.05))


def make_trainer(
    folder: str | Path,
    model: torch.nn.Module,
    *,
    accumulation: int = 1,
    steps: int = 20,
    kind: type | None = None,
    more: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A GaudiTrainer in lazy mode with fused AdamW and fused clipping, bf16 under autocast.

    `kind` is another trainer to take instead, `more` what its constructor is given; options are training arguments.
    """
    from optimum.habana import GaudiConfig, GaudiTrainer, GaudiTrainingArguments

    arguments = GaudiTrainingArguments(
        output_dir=str(folder),
        use_habana=True,
        use_lazy_mode=True,
        bf16=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", "logging_steps": steps} | options,
    )
    config = GaudiConfig(use_fused_adam=True, use_fused_clip_norm=True, use_torch_autocast=True)
    trainer = GaudiTrainer if kind is None else kind
    return trainer(model=model, args=arguments, gaudi_config=config, train_dataset=Tokens(), **more or {})


def run(lora: bool, accumulation: int, steps: int, layers: int) -> dict[str, Any]:
    """Train, then resume from half-way; report counts, losses and the largest difference of the two results."""
    simulator = start()
    half = steps // 2
    with tempfile.TemporaryDirectory() as folder:
        options = {"accumulation": accumulation, "steps": steps, "logging_steps": 1}
        first = make_trainer(folder, make_model(lora=lora, layers=layers), **options)
        simulator.reset()
        first.train()
        report = simulator.report()
        saving = options | {"save_strategy": "steps", "save_steps": half}
        make_trainer(folder, make_model(lora=lora, layers=layers), **saving).train()
        resumed = make_trainer(folder, make_model(lora=lora, layers=layers), **options)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{half}")
    pairs = zip(first.model.parameters(), resumed.model.parameters(), strict=True)
    return {
        "optimizer": type(first.optimizer.optimizer).__name__,
        "device": str(first.args.device),
        "losses": [entry["loss"] for entry in first.state.log_history if "loss" in entry],
        "resume_difference": max((a.cpu() - b.cpu()).abs().max().item() for a, b in pairs),
        "report": report.as_dict(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    print("RESULT " + json.dumps(run(options.lora, options.accumulation, options.steps, options.layers)))


if __name__ == "__main__":
    main()
