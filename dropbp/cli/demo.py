"""The embedded comparison: one small model, fine-tuned plainly and with DropBP on the same batches."""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dropbp.cli.corpus import digest, english_prose, source_code
from dropbp.cli.embedded import Base, Recipe, base_folder, byte_tokenizer, cached_base, new_model
from dropbp.cli.examples import Example, pack
from dropbp.cli.report import new_result
from dropbp.cli.training import Job, Settings, train
from dropbp.integrations.transformers import DropBPCallback

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

OUTPUT = Path("runs/demo")
_EVALUATION_EXAMPLES = 32


def run_demo(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Run the comparison with the options of `dropbp finetune`.

    Returns:
        The result and the folder it belongs into.
    """
    recipe = _recipe(args)
    output = args.output or OUTPUT
    base = _base(recipe.base, args.device)
    settings = _settings(recipe, output, args)
    jobs = [_job("plain", base, recipe), _job(f"dropbp p={args.drop_rate:g}", base, recipe)]
    runs = [train(jobs[0], settings)]
    if not args.plain:
        callback = DropBPCallback(args.drop_rate, masks=args.masks, seed=recipe.seed)
        runs.append(train(jobs[1], settings, callback))
    return new_result({**vars(args), "recipe": asdict(recipe)}, args.device, runs), output


def _recipe(args: argparse.Namespace) -> Recipe:
    chosen = {
        "steps": args.max_steps,
        "batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
    }
    return replace(Recipe(), **{name: value for name, value in chosen.items() if value is not None})


def _base(base: Base, device: str | None) -> LlamaForCausalLM:
    code = source_code(base.corpus_bytes)
    return cached_base(base_folder(base, digest(code)), lambda: _train_base(base, code, device))


def _train_base(base: Base, code: str, device: str | None) -> LlamaForCausalLM:
    model = new_model(base)
    job = Job("base (once)", model, byte_tokenizer(), _examples(code, base))
    with tempfile.TemporaryDirectory() as folder:
        train(job, _base_settings(base, Path(folder), device))
    return model


def _base_settings(base: Base, folder: Path, device: str | None) -> Settings:
    return Settings(
        output=folder,
        learning_rate=base.learning_rate,
        weight_decay=0.01,
        batch_size=base.batch_size,
        max_steps=base.steps,
        keep_checkpoints=False,
        seed=base.seed,
        device=device,
    )


def _settings(recipe: Recipe, output: Path, args: argparse.Namespace) -> Settings:
    return Settings(
        output=output,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        gradient_accumulation=args.gradient_accumulation or 1,
        max_steps=recipe.steps,
        warmup_steps=args.warmup_steps,
        schedule="constant_with_warmup",  # a decaying rate would favour the run that ends first at equal times
        keep_checkpoints=False,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
        seed=recipe.seed,
        device=args.device,
        eval_steps=args.eval_steps or max(1, recipe.steps // 5),
    )


def _job(name: str, base: LlamaForCausalLM, recipe: Recipe) -> Job:
    examples = _examples(english_prose(recipe.corpus_bytes), recipe.base)
    held_out = max(1, min(_EVALUATION_EXAMPLES, len(examples) // 10))
    return Job(name, copy.deepcopy(base), byte_tokenizer(), examples[:-held_out], examples[-held_out:])


def _examples(text: str, base: Base) -> list[Example]:
    ids: list[int] = byte_tokenizer()(text)["input_ids"]
    return pack(ids, base.sequence_length)
