"""From rows to what a causal language model trains on: token ids, and labels on the responses only.

What a row says is read in `dropbp.cli.formats`; conversations go through the tokenizer's own chat template.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from dropbp.cli.formats import Chat, Content, Kind, NothingToLearnError, Pair, Text, Turn, kind_of
from dropbp.cli.rows import Row
from dropbp.errors import ConfigError
from dropbp.inputs import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Example: TypeAlias = dict[str, list[int]]


@dataclass(frozen=True)
class Encoder:
    """Turns what rows say into token ids and labels; `max_length` is where `encode_rows` cuts them."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def pair(self, prompt: str, response: str) -> Example:
        """A prompt without loss and a response with loss, closed by the end token."""
        prompt_ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if prompt_ids[-1:] == [self.tokenizer.eos_token_id]:
            prompt_ids = prompt_ids[:-1]
        response_ids = self.plain_ids(response)
        return {"input_ids": prompt_ids + response_ids, "labels": [IGNORED] * len(prompt_ids) + response_ids}

    def chat(self, turns: Sequence[Turn]) -> Example:
        """A conversation up to its last learned turn; the loss is on what the assistant answers.

        The first turn never has a loss, because it answers nothing.
        """
        ids: list[int] = []
        labels: list[int] = []
        seen = ""
        messages = [turn.message for turn in turns]
        for count in (count for count, turn in enumerate(turns) if turn.learned and count):
            question = self._rendered(messages[:count], add_generation_prompt=True)
            self._extend(ids, labels, seen, question, False)
            seen = self._rendered(messages[: count + 1])
            self._extend(ids, labels, question, seen, True)
        return {"input_ids": ids, "labels": labels}

    def plain_ids(self, text: str) -> list[int]:
        """The tokens of a text, closed by the end token."""
        return [*self._ids(text), self.tokenizer.eos_token_id]

    def check_template(self) -> None:
        """Raises ConfigError if the tokenizer cannot render conversations."""
        if not self.tokenizer.chat_template:
            raise ConfigError(
                "the data set has messages and the tokenizer has no chat template; use a chat model's tokenizer."
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _rendered(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        self.check_template()
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"the tokenizer's chat template refuses a conversation: {error}") from error
        return text

    def _extend(self, ids: list[int], labels: list[int], seen: str, text: str, learned: bool) -> None:
        """Add the tokens of `text` beyond `seen`."""
        if not text.startswith(seen):
            raise ConfigError(
                "the tokenizer's chat template changes earlier turns when a turn is added, so the responses cannot be "
                "told from the prompts; use a data set with the columns prompt and completion."
            )
        longer = self._ids(text)  # as a whole, if no token reaches across the border
        new = longer[len(ids) :] if longer[: len(ids)] == ids else self._ids(text[len(seen) :])
        ids.extend(new)
        labels.extend(new if learned else [IGNORED] * len(new))


@dataclass
class Encoded:
    """Examples, and what became of their rows.

    Attributes:
        kind: of the data set.
        rows: how many there were.
        examples: for each row that is not left out one, but for plain text, which is packed.
        left_out: rows by the reason for which they are left out.
        rows_cut: rows of which only the first `max_length` tokens are trained.
        tokens_left_out: of plain text, the last ones, which do not fill an example.
    """

    kind: str
    rows: int
    examples: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    rows_cut: int = 0
    tokens_left_out: int = 0

    @property
    def rows_without_loss(self) -> int:
        """Number of rows left out, for any reason."""
        return sum(self.left_out.values())

    def notes(self) -> Iterator[str]:
        """Sentences about what is not trained."""
        if self.left_out:
            reasons = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.items())
            yield f"{self.rows_without_loss} of {self.rows} rows were left out: {reasons}"
        if self.rows_cut:
            yield f"{self.rows_cut} of {self.rows} rows were cut at --max-length"
        if self.tokens_left_out:
            yield f"the last {self.tokens_left_out} tokens of the text were left out: they do not fill an example"


def encode_rows(
    rows: Sequence[Row],
    encoder: Encoder,
    progress: Callable[[Iterable[Row]], Iterable[Row]],
    source: str = "the data set",
) -> Encoded:
    """Examples of all rows; rows that teach nothing, or not within `max_length`, are left out and counted.

    `progress` wraps the rows, for a progress bar; errors call the data set `source`. Raises ConfigError if the columns
    fit no kind, a row cannot be used, or no row has a response that can be learned from.
    """
    kind = kind_of(rows[0], source)
    if kind.name in ("chat", "sharegpt"):
        encoder.check_template()
    encoded, stream = Encoded(kind.name, len(rows)), []
    for number, row in enumerate(progress(rows), 1):
        try:
            stream += _encode_row(kind, encoder, row, encoded)
        except NothingToLearnError as reason:
            encoded.left_out[str(reason)] += 1
        except ConfigError as error:
            raise ConfigError(f"row {number} of {source} does not fit the kind {kind.name!r}: {error}") from error
    encoded.examples += pack(stream, encoder.max_length)
    if kind.name == "text":
        encoded.tokens_left_out = len(stream) - sum(len(example["input_ids"]) for example in encoded.examples)
    if not encoded.examples:
        reasons = "".join(f" ({note})" for note in encoded.notes())
        raise ConfigError(
            f"{source}: none of the {len(rows)} rows leaves a token to learn within --max-length "
            f"{encoder.max_length}{reasons}."
        )
    return encoded


def _encode_row(kind: Kind, encoder: Encoder, row: Row, encoded: Encoded) -> list[int]:
    """Add the row's example; of plain text, return the tokens instead."""
    content = kind.read(row)
    if isinstance(content, Text):
        return encoder.plain_ids(content.text)
    example = _counted(_encode(content, encoder), encoder)
    encoded.rows_cut += len(example["input_ids"]) > encoder.max_length
    encoded.examples.append({name: values[: encoder.max_length] for name, values in example.items()})
    return []


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


def collate_left(examples: Sequence[Example], padding_id: int) -> dict[str, torch.Tensor]:
    """The same padded on the left: then the labels of all rows, which are their ends, stand at the same places."""
    batch = collate([{name: values[::-1] for name, values in example.items()} for example in examples], padding_id)
    return {name: tensor.flip(1) for name, tensor in batch.items()}


def pack(ids: Sequence[int], length: int) -> list[Example]:
    """Cut a stream of tokens into examples of `length`; a remainder is kept if it is all there is."""
    starts = range(0, max(len(ids) - length, 0) + 1, length)
    blocks = [list(ids[start : start + length]) for start in starts]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]


def _encode(content: Content, encoder: Encoder) -> Example:
    if isinstance(content, Chat):
        return encoder.chat(content.turns)
    assert isinstance(content, Pair)
    return encoder.pair(content.prompt, content.response)


def _counted(example: Example, encoder: Encoder) -> Example:
    """The example, if a token of it is learned. The first token of a row never is: nothing comes before it."""
    if all(label == IGNORED for label in example["labels"][1:]):
        learned = any(label != IGNORED for label in example["labels"])
        raise NothingToLearnError("no token to learn" if learned else "no response")
    if all(label == IGNORED for label in example["labels"][1 : encoder.max_length]):
        raise NothingToLearnError(f"no response within --max-length {encoder.max_length}")
    return example


def _padded(ids: list[int], length: int, filling: int) -> list[int]:
    return ids + [filling] * (length - len(ids))
