"""From rows to what a causal language model trains on: token ids, and labels on the responses only.

The kind of a data set is read from its column names. Prompts are those of Stanford Alpaca
(github.com/tatsu-lab/stanford_alpaca); conversations go through the tokenizer's own chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from dropbp.cli.rows import Row
from dropbp.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
Example: TypeAlias = dict[str, list[int]]
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Encoder:
    """Turns rows of one kind into examples of at most `max_length` tokens."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def pair(self, prompt: str, response: str) -> Example:
        """A prompt without loss and a response with loss, closed by the end token."""
        prompt_ids: list[int] = self.tokenizer(prompt)["input_ids"]
        prompt_ids = _without_end(prompt_ids, self.tokenizer.eos_token_id)
        response_ids = self.plain_ids(response)
        return self._cut(prompt_ids + response_ids, [IGNORED] * len(prompt_ids) + response_ids)

    def chat(self, messages: Sequence[dict[str, str]]) -> Example:
        """A conversation; the loss is on what the assistant says."""
        ids: list[int] = []
        labels: list[int] = []
        for count, message in enumerate(messages, 1):
            answer = message["role"] == "assistant"
            if answer:
                self._extend(ids, labels, self._template(messages[: count - 1], add_generation_prompt=True), False)
            self._extend(ids, labels, self._template(messages[:count]), answer)
        return self._cut(ids, labels)

    def plain_ids(self, text: str) -> list[int]:
        """The tokens of a text, closed by the end token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id]

    def _template(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ConfigError(f"the tokenizer's chat template refuses a conversation: {error}") from error
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @staticmethod
    def _extend(ids: list[int], labels: list[int], longer: list[int], learned: bool) -> None:
        if longer[: len(ids)] != ids:
            raise ConfigError(
                "the tokenizer's chat template changes earlier turns when a turn is added, so the responses cannot be "
                "told from the prompts; use a data set with the columns prompt and completion."
            )
        new = longer[len(ids) :]
        ids.extend(new)
        labels.extend(new if learned else [IGNORED] * len(new))

    def _cut(self, ids: list[int], labels: list[int]) -> Example:
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}


@dataclass(frozen=True)
class Kind:
    """A kind of data set: the columns by which it is known, and how one row becomes an example."""

    name: str
    columns: tuple[str, ...]
    encode: Callable[[Encoder, Row], Example]


@dataclass
class Encoded:
    """Examples, and what became of the rows they came from."""

    kind: str
    examples: list[Example] = field(default_factory=list)
    rows_without_loss: int = 0


def _instruction(answer: str, context: str) -> Callable[[Encoder, Row], Example]:
    def encode(encoder: Encoder, row: Row) -> Example:
        template = _WITH_INPUT if row.get(context) else _WITHOUT_INPUT
        prompt = template.format(instruction=row["instruction"], input=row.get(context))
        return encoder.pair(prompt, str(row[answer]))

    return encode


KINDS = (
    Kind("chat", ("messages",), lambda encoder, row: encoder.chat(row["messages"])),
    Kind("alpaca", ("instruction", "output"), _instruction("output", "input")),
    Kind("dolly", ("instruction", "response"), _instruction("response", "context")),
    Kind("completion", ("prompt", "completion"), lambda e, row: e.pair(str(row["prompt"]), str(row["completion"]))),
)
TEXT_COLUMN = "text"


def encode_rows(rows: Sequence[Row], encoder: Encoder, progress: Callable[[Iterable[Row]], Iterable[Row]]) -> Encoded:
    """Examples of all rows; rows whose response does not fit into `max_length` are left out and counted.

    Args:
        rows: rows with the columns of one of `KINDS`, or with a column `text`.
        encoder: how text becomes tokens.
        progress: wraps the rows, for a progress bar.

    Raises:
        ConfigError: the columns fit no kind, or no row has a response that can be learned from.
    """
    columns = set(rows[0])
    kind = next((kind for kind in KINDS if columns.issuperset(kind.columns)), None)
    if kind is None and TEXT_COLUMN not in columns:
        raise ConfigError(f"the data set has the columns {', '.join(sorted(map(str, columns)))}; {_known_columns()}.")
    if kind is not None and kind.name == "chat" and not encoder.tokenizer.chat_template:
        raise ConfigError(
            "the data set has messages and the tokenizer has no chat template; use a chat model's tokenizer."
        )
    encoded = _encode_text(rows, encoder, progress) if kind is None else _encode_kind(kind, rows, encoder, progress)
    if not encoded.examples:
        raise ConfigError(
            f"none of the {len(rows)} rows leaves a token to learn within --max-length {encoder.max_length}."
        )
    return encoded


def collate(examples: Sequence[Example], padding_id: int) -> dict[str, torch.Tensor]:
    """One batch, padded on the right to its longest example. All three tensors are `(batch, sequence)`."""
    import torch

    longest = max(len(example["input_ids"]) for example in examples)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {
        "input_ids": torch.tensor([_padded(example["input_ids"], longest, padding_id) for example in examples]),
        "attention_mask": (torch.arange(longest)[None, :] < lengths[:, None]).long(),
        "labels": torch.tensor([_padded(example["labels"], longest, IGNORED) for example in examples]),
    }


def pack(ids: Sequence[int], length: int) -> list[Example]:
    """Cut a stream of tokens into examples of `length`; a remainder is kept if it is all there is."""
    starts = range(0, max(len(ids) - length, 0) + 1, length)
    blocks = [list(ids[start : start + length]) for start in starts]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]


def _encode_kind(
    kind: Kind, rows: Sequence[Row], encoder: Encoder, progress: Callable[[Iterable[Row]], Iterable[Row]]
) -> Encoded:
    encoded = Encoded(kind.name)
    for number, row in enumerate(progress(rows), 1):
        example = _encode_row(kind, encoder, row, number)
        if all(label == IGNORED for label in example["labels"][1:]):
            encoded.rows_without_loss += 1
        else:
            encoded.examples.append(example)
    return encoded


def _encode_row(kind: Kind, encoder: Encoder, row: Row, number: int) -> Example:
    try:
        return kind.encode(encoder, row)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"row {number} of the data set does not fit the kind {kind.name!r}: {error!r}.") from error


def _encode_text(rows: Sequence[Row], encoder: Encoder, progress: Callable[[Iterable[Row]], Iterable[Row]]) -> Encoded:
    texts = (str(row[TEXT_COLUMN]) for row in progress(rows) if row.get(TEXT_COLUMN))
    ids = list(chain.from_iterable(map(encoder.plain_ids, texts)))
    return Encoded("text", pack(ids, encoder.max_length))


def _padded(ids: list[int], length: int, filling: int) -> list[int]:
    return ids + [filling] * (length - len(ids))


def _without_end(ids: list[int], end_id: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end_id else ids


def _known_columns() -> str:
    known = [" + ".join(kind.columns) for kind in KINDS]
    return f"known are {', '.join(known)}, or {TEXT_COLUMN}"
