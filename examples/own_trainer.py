"""Hugging Face's Trainer with DropBP, which takes one more line. Runs on a CPU in seconds, without downloads.

    python examples/own_trainer.py --drop-rate 0.5

To use your own model and data, replace `model` and `data`; nothing else changes.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dropbp.integrations.transformers import DropBPCallback

VOCABULARY, LENGTH = 64, 32


def small_model() -> LlamaForCausalLM:
    """A Llama of 4 layers with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, use_cache=False, **sizes))


def counting(examples: int) -> list[dict[str, list[int]]]:
    """Rows that count upwards from different numbers: a pattern to learn."""
    rows = [[(start + step) % VOCABULARY for step in range(LENGTH)] for start in range(examples)]
    return [{"input_ids": row, "labels": row} for row in rows]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Train, print what was dropped, and return the last figures of the trainer's log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-rate", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)
    callback = DropBPCallback(drop_rate=options.drop_rate)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=small_model(),
            args=TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=counting(256),
            callbacks=[callback],  # the one line
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {"first_loss": losses[0], "last_loss": losses[-1], **callback.report()}
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, realised drop rate {figures['realised_drop_rate']:.3f}")
    return figures


if __name__ == "__main__":
    main()
