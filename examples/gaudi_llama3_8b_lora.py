r"""Llama-3-8B with LoRA on a Gaudi2, at the settings of the DropBP paper: GaudiTrainer, and one line for DropBP.

    pip install 'dropbp[gaudi]' datasets      # on a machine with Gaudi's software
    python examples/gaudi_llama3_8b_lora.py --drop-rate 0.875

The settings: rank 8, alpha 16 and dropout .05 on all linear layers, bf16, sequences of 512 tokens, 64 micro-batches of
2 per step, AdamW with learning rate 1e-4 and weight decay .01, 100 warm-up steps and a cosine schedule. Only the first
steps compile graphs. All batches have the same shape, because each new shape would be compiled too.

Without a Gaudi, you can try the script with a small model on the simulated one:

    python -m dropbp.backends.hpu_simulator examples/gaudi_llama3_8b_lora.py \
        --model DIR --dataset rows.jsonl --max-steps 20
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main(argv: Sequence[str] | None = None) -> None:
    """Train and save the adapter."""
    args = parser().parse_args(argv)
    # Gaudi's software reads this when it is first imported, so modules that use it are imported afterwards.
    os.environ.setdefault("PT_HPU_LAZY_MODE", "1")
    from optimum.habana.transformers.modeling_utils import adapt_transformers_to_gaudi

    adapt_transformers_to_gaudi()
    trainer = make_trainer(args)
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(str(args.output))
    dropped = trainer.dropbp.report()["realised_drop_rate"]
    sys.stdout.write(f"Adapter saved in {args.output}; {dropped:.1%} of the blocks' backward was skipped.\n")


def make_trainer(args: argparse.Namespace) -> Any:
    """GaudiTrainer with fused AdamW and clipping, and with DropBP."""
    from optimum.habana import GaudiConfig

    from dropbp.cli.models import load_tokenizer
    from dropbp.integrations.optimum_habana import DropBPGaudiTrainer

    tokenizer = load_tokenizer(args.model)
    return DropBPGaudiTrainer(
        model=make_model(args),
        args=training_arguments(args),
        gaudi_config=GaudiConfig(use_fused_adam=True, use_fused_clip_norm=True, use_torch_autocast=True),
        train_dataset=read_examples(args, tokenizer),
        data_collator=functools.partial(pad, length=args.max_length, padding_id=tokenizer.pad_token_id),
        drop_rate=args.drop_rate,
        dropbp_options={"masks": args.masks, "seed": args.seed},
    )


def make_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model in bf16, with adapters that stay in float32."""
    import torch
    from peft import LoraConfig, get_peft_model

    from dropbp.cli.models import load_model

    model = load_model(args.model, torch.bfloat16)
    model.config.use_cache = False
    torch.manual_seed(args.seed)
    return get_peft_model(model, LoraConfig(**LORA))


def training_arguments(args: argparse.Namespace) -> Any:
    """Sizes, schedule and mode."""
    from optimum.habana import GaudiTrainingArguments

    return GaudiTrainingArguments(
        output_dir=str(args.output),
        use_habana=True,
        use_lazy_mode=os.environ["PT_HPU_LAZY_MODE"] != "0",
        bf16=True,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=max(1, args.batch // args.micro_batch),
        learning_rate=args.learning_rate,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup_steps,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        dataloader_drop_last=True,
        logging_steps=args.logging_steps,
        save_steps=args.save_steps,
        save_total_limit=2,
        report_to=args.report_to,
        seed=args.seed,
    )


def read_examples(args: argparse.Namespace, tokenizer: Any) -> Any:
    """Alpaca, Dolly, chats, prompt and completion, or plain text; the columns tell which."""
    from dropbp.cli.examples import Encoder, encode_rows
    from dropbp.cli.rows import read_rows

    return encode_rows(read_rows(args.dataset), Encoder(tokenizer, args.max_length), iter).examples


def pad(examples: Sequence[dict[str, list[int]]], length: int, padding_id: int) -> dict[str, torch.Tensor]:
    """A batch whose shape does not depend on the examples: all three tensors are `(batch, length)`."""
    import torch

    from dropbp.inputs import IGNORED

    def rows(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([e[key] + [filler] * (length - len(e[key])) for e in examples])

    ids, labels = rows("input_ids", padding_id), rows("labels", IGNORED)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    mask = (torch.arange(length)[None, :] < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def parser() -> argparse.ArgumentParser:
    """The options; sizes and schedule default to the paper's."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="meta-llama/Meta-Llama-3-8B", help="folder or Hub id (%(default)s)")
    made.add_argument("--dataset", default="yahma/alpaca-cleaned", help="file or Hub id (%(default)s)")
    made.add_argument("--output", type=Path, default=Path("runs/gaudi-llama3-8b-lora"), help="folder (%(default)s)")
    made.add_argument("--drop-rate", type=float, default=0.5, help="the paper uses .5, .75, .875 (%(default)s)")
    made.add_argument("--masks", default="nested", help="mask sampler; the paper uses independent (%(default)s)")
    made.add_argument("--max-length", type=int, default=512, help="tokens per example (%(default)s)")
    made.add_argument("--micro-batch", type=int, default=2, help="examples per forward (%(default)s)")
    made.add_argument("--batch", type=int, default=128, help="examples per optimizer step (%(default)s)")
    made.add_argument("--learning-rate", type=float, default=1e-4, help="(%(default)s)")
    made.add_argument("--warmup-steps", type=int, default=100, help="(%(default)s)")
    made.add_argument("--epochs", type=float, default=1.0, help="(%(default)s)")
    made.add_argument("--max-steps", type=int, default=-1, help="optimizer steps; overrides --epochs")
    made.add_argument("--gradient-checkpointing", action="store_true", help="keep only the inputs of blocks")
    made.add_argument("--logging-steps", type=int, default=10, help="(%(default)s)")
    made.add_argument("--save-steps", type=int, default=200, help="(%(default)s)")
    made.add_argument("--resume", help="folder of a checkpoint to continue from")
    made.add_argument("--report-to", default="none", help="tensorboard, wandb, ... (%(default)s)")
    made.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return made


if __name__ == "__main__":
    main()
