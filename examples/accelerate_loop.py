"""A training loop on accelerate with DropBP, in one or several processes. Runs on CPUs in seconds, without downloads.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 1 examples/accelerate_loop.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py

The last line starts two processes on CPUs too. `--cpu` starts a single process, whatever `--num_processes` says, unless
MPI is installed. The script passes `cpu=True`, so accelerate stays on the CPU; without it accelerate uses the GPUs.
DropBP is enabled before `prepare`. DistributedDataParallel must know that parameters can lack a gradient.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

import dropbp

VOCABULARY, LENGTH = 64, 32


def small_model() -> nn.Module:
    """A Llama of 4 layers with random weights, the same on every process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, use_cache=False, **sizes))


def counting(examples: int) -> TensorDataset:
    """Rows that count upwards from different numbers: a pattern to learn."""
    return TensorDataset((torch.arange(examples)[:, None] + torch.arange(LENGTH)) % VOCABULARY)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, print what was dropped on the first process, and return the handle's report with the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-rate", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    model = small_model()
    handle = dropbp.enable(model, options.drop_rate)  # the one line; the same masks are drawn on every process
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(counting(8 * options.steps * accelerator.num_processes), batch_size=8, shuffle=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for (ids_BS,) in loader:
        loss = wrapped(input_ids=ids_BS, labels=ids_BS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    report = handle.report()
    handle.remove()
    accelerator.print(
        f"{accelerator.num_processes} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}, "
        f"drop rate {report['realised_drop_rate']:.3f}"
    )
    # In this order: a replica that outlives the process group, or a group the process, can hang or abort on gloo.
    wrapped, optimizer, loader = accelerator.free_memory(wrapped, optimizer, loader)
    accelerator.end_training()
    return {**report, "losses": losses}


if __name__ == "__main__":
    main()
