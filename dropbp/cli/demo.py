"""The demo: a chat model is fine-tuned on questions with options, plainly and with DropBP, for about the same time.

Model and questions come from a package registry; `--model` may name another model. Both runs see the same examples in
the same order, and the same learning rate, which decays to zero at their ends. The run with DropBP takes as many steps
as the FLOPs of the plain run allow.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dropbp.cli.choices import Question, accuracy, answers, choice_questions
from dropbp.cli.examples import Encoder, Example, encode_rows
from dropbp.cli.models import load_model, load_tokenizer
from dropbp.cli.report import new_result
from dropbp.cli.smollm import load_smollm
from dropbp.cli.training import Job, Settings, train
from dropbp.integrations.transformers import DropBPCallback

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OUTPUT = Path("runs/demo")
_SHOWN = 3  # questions whose answers are shown
_Model = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@dataclass(frozen=True)
class Recipe:
    """The sizes and hyper-parameters of the demo. Steps are those of the plain run."""

    steps: int = 12
    batch_size: int = 8
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 2
    held_out: int = 32
    longest: int = 200  # characters of a question, so that a step takes seconds
    evaluations: int = 2
    seed: int = 0


def run(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Run the comparison with the options of `dropbp finetune`. Return the result and the folder it belongs into.

    Raises ConfigError if model or questions cannot be had.
    """
    recipe, output = _recipe(args), args.output or OUTPUT
    questions, held_out = choice_questions(recipe.held_out, recipe.seed, recipe.longest)
    model, tokenizer = _loaded(args)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = _measured(model, tokenizer, held_out, args)
    runs = [_run("plain", (model, tokenizer), None, recipe, (questions, held_out), args)]
    if not args.plain and args.drop_rate:
        model.load_state_dict(weights)
        callback = DropBPCallback(args.drop_rate, masks=args.masks, seed=recipe.seed)
        longer = replace(recipe, steps=_equal_steps(recipe.steps, args.drop_rate))
        name = f"dropbp p={args.drop_rate:g}"
        runs.append(_run(name, (model, tokenizer), callback, longer, (questions, held_out), args))
    result = new_result({**vars(args), "recipe": asdict(recipe)}, args.device, runs)
    return {**result, "before": before, "questions": [asdict(question) for question in held_out[:_SHOWN]]}, output


def _recipe(args: argparse.Namespace) -> Recipe:
    same = {name: getattr(args, name) for name in ("batch_size", "learning_rate", "seed")}
    chosen = {"steps": args.max_steps, **same}
    return replace(Recipe(), **{name: value for name, value in chosen.items() if value is not None})


def _loaded(args: argparse.Namespace) -> _Model:
    if args.model is None:
        return load_smollm()
    return load_model(args.model, torch.float32), load_tokenizer(args.model)


def _equal_steps(steps: int, drop_rate: float) -> int:
    """Steps that cost the FLOPs of this many plain ones: a backward costs two forwards, and a part of it is dropped."""
    return max(1, round(steps * 3 / (3 - 2 * drop_rate)))


def _run(
    name: str,
    loaded: _Model,
    callback: DropBPCallback | None,
    recipe: Recipe,
    data: tuple[list[Question], list[Question]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    model, tokenizer = loaded
    questions, held_out = data
    needed = recipe.steps * recipe.batch_size * (args.gradient_accumulation or 1)
    examples = _examples(questions[:needed], tokenizer, args.max_length)
    labelled = args.logits == "labelled" or (args.logits is None and args.model is None)
    job = Job(name, model, tokenizer, examples, _examples(held_out, tokenizer, args.max_length), labelled=labelled)
    run = train(job, _settings(recipe, args), callback)
    return {**run, **_measured(model, tokenizer, held_out, args)}


def _examples(questions: list[Question], tokenizer: Any, max_length: int) -> list[Example]:
    return encode_rows([question.row for question in questions], Encoder(tokenizer, max_length), iter).examples


def _measured(model: Any, tokenizer: Any, held_out: list[Question], args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy on all held-out questions, and answers to the first of them."""
    model.eval()
    with torch.autocast(model.device.type, torch.bfloat16, enabled=_bf16(args)):
        return {
            "accuracy": accuracy(model, tokenizer, held_out),
            "answers": answers(model, tokenizer, held_out[:_SHOWN]),
        }


def _settings(recipe: Recipe, args: argparse.Namespace) -> Settings:
    return Settings(
        output=args.output or OUTPUT,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        batch_size=recipe.batch_size,
        gradient_accumulation=args.gradient_accumulation or 1,
        max_steps=recipe.steps,
        warmup_steps=recipe.warmup_steps,
        keep_checkpoints=False,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=_bf16(args),
        seed=recipe.seed,
        device=args.device,
        eval_steps=args.eval_steps or max(1, -(-recipe.steps // recipe.evaluations)),
    )


def _bf16(args: argparse.Namespace) -> bool:
    """Whether to use mixed precision: if asked for, or if the CPU supports bf16; on other CPUs it is slower."""
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(args.bf16 or (args.device in (None, "cpu") and known is not None and known()))
