"""Fine-tuning of a real causal language model: from the options of `dropbp finetune` to a saved model."""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from dropbp.cli.examples import Encoder, Example, encode_rows
from dropbp.cli.models import load_model, load_tokenizer, with_lora
from dropbp.cli.report import new_result
from dropbp.cli.rows import read_rows
from dropbp.cli.training import Job, Settings, train
from dropbp.errors import ConfigError, ResourceError, as_resource_error
from dropbp.files import last_whole_checkpoint, write_text
from dropbp.integrations.transformers import STATE_FILE, DropBPCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

OUTPUT = Path("runs/finetune")
LEARNING_RATE = {"lora": 1e-4, "none": 2e-5}
WEIGHT_DECAY = {"lora": 0.01, "none": 0.02}
# names and patterns; a trainer silently resets what is missing of these
RESUMED_FILES = {"optimizer.pt": "optimizer.*", "scheduler.pt": "scheduler.pt", "rng_state.pth": "rng_state*.pth"}
MICRO_BATCH, ACCUMULATION = 2, 64  # the paper's batch of 128


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Fine-tune, save and evaluate with the options of `dropbp finetune`. Return the result and the model's folder.

    Raises DropBPError for bad input. Where memory or disk space ran out (ResourceError) or Ctrl-C was pressed, the
    message names the checkpoint that is kept.
    """
    output = args.output or OUTPUT
    checkpoint = _checkpoint(output, args.resume)
    job = _job(args)
    callback = None if args.plain else _callback(args)
    with _naming_kept_checkpoint(output):
        run = train(job, _settings(args, output), callback, checkpoint)
        _save(job, callback, output)
    return new_result(vars(args), args.device, [run]), output


def _callback(args: argparse.Namespace) -> DropBPCallback:
    return DropBPCallback(args.drop_rate, masks=args.masks, seed=args.seed, activation_cache=args.activation_cache)


def split(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and examples to evaluate on, drawn at random but the same for the same seed.

    Raises ConfigError if there are too few examples to keep both.
    """
    if not fraction:
        return examples, []
    shuffled = random.Random(seed).sample(examples, len(examples))
    held_out = max(1, round(fraction * len(examples)))
    if held_out >= len(examples):
        raise ConfigError(
            f"{len(examples)} example(s) cannot be split for evaluation; pass more, or --eval-fraction 0."
        )
    return shuffled[held_out:], shuffled[:held_out]


def _job(args: argparse.Namespace) -> Job:
    rows = read_rows(args.dataset)
    tokenizer = load_tokenizer(args.model)
    progress = partial(tqdm, desc="tokens", unit="row")
    encoded = encode_rows(rows, Encoder(tokenizer, args.max_length), progress, f"--dataset {args.dataset}")
    for note in encoded.notes():
        logger.warning("--dataset %s: %s", args.dataset, note)
    examples, evaluation = split(encoded.examples, args.eval_fraction, args.seed)
    name = "plain" if args.plain else f"dropbp p={args.drop_rate:g}"
    return Job(name, _model(args), tokenizer, examples, evaluation, labelled=args.logits == "labelled")


def _model(args: argparse.Namespace) -> PreTrainedModel:
    frozen_bf16 = args.bf16 and args.peft == "lora"  # trained weights stay in fp32, under autocast
    model = load_model(args.model, torch.bfloat16 if frozen_bf16 else torch.float32)
    # a row's state is the same each time only where nothing is drawn at random
    options: dict[str, Any] = {} if args.activation_cache is None else {"lora_dropout": 0.0}
    return with_lora(model, args.seed, **options) if args.peft == "lora" else model


_SAME_SETTINGS = (
    "epochs", "max_steps", "warmup_steps", "eval_steps", "save_steps", "gradient_checkpointing", "bf16", "seed",
    "device", "report_to",
)  # fmt: skip


def _settings(args: argparse.Namespace, output: Path) -> Settings:
    return Settings(
        output=output,
        learning_rate=args.learning_rate or LEARNING_RATE[args.peft],
        weight_decay=WEIGHT_DECAY[args.peft],
        batch_size=args.batch_size or MICRO_BATCH,
        gradient_accumulation=args.gradient_accumulation or ACCUMULATION,
        **{name: getattr(args, name) for name in _SAME_SETTINGS},
    )


def _checkpoint(output: Path, resume: bool) -> str | None:
    last, faults = last_whole_checkpoint(output, RESUMED_FILES)
    if not resume and (last or faults):
        raise ConfigError(f"{output} holds checkpoints of an earlier run; pass --resume, or another --output.")
    for name, fault in faults.items():
        logger.warning("%s is ignored because it is incomplete: %s", output / name, fault)
    if resume and last is None:
        found = f"no whole checkpoint ({'; '.join(faults.values())})" if faults else "no checkpoint"
        raise ConfigError(f"--resume: {output} holds {found}. Start a new run with another --output.")
    return None if last is None else str(last)


@contextmanager
def _naming_kept_checkpoint(output: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_kept(output) or ' before the first checkpoint'}") from None
    except Exception as error:
        exhausted = as_resource_error(error)
        if exhausted is None:
            raise
        kept = _kept(output) or ". No checkpoint was written before."
        raise ResourceError(f"{str(exhausted).rstrip('.')}{kept}") from error


def _kept(output: Path) -> str:
    last, _ = last_whole_checkpoint(output, RESUMED_FILES)
    return "" if last is None else f"; {last} is kept: add --resume to continue"


def _save(job: Job, callback: DropBPCallback | None, output: Path) -> None:
    job.model.save_pretrained(output)
    job.tokenizer.save_pretrained(output)
    if callback is not None:
        write_text(output / STATE_FILE, json.dumps(callback.state(), indent=1) + "\n")
