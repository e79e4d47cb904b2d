"""Reads a row of a data set: a prompt with a response, a conversation, or plain text.

The kinds are those of TRL and of common data sets, and are recognised by their columns. Instructions get the prompt of
Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca). Only text is ever trained: a value of another type is refused,
and a row without a response is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from dropbp.cli.rows import Row
from dropbp.errors import ConfigError

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant"),
    "human": "user",
    "observation": "tool",
}
_SYSTEM_COLUMNS = ("system", "system_prompt")
_UNUSED_COLUMNS = ("history", "tools", "image", "images", "audio", "audios", "video", "videos")
_EMPTY: tuple[Any, ...] = (None, "", "[]", "{}", "null", [], {})


class NothingToLearnError(Exception):
    """A row teaches nothing; the message is the reason."""


@dataclass(frozen=True)
class Pair:
    """A prompt without loss and a response with loss."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Turn:
    """A message of a conversation, as chat templates take it, and whether it has a loss."""

    message: dict[str, str]
    learned: bool


@dataclass(frozen=True)
class Chat:
    """A conversation."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Text:
    """Text that is learned as a whole."""

    text: str


Content: TypeAlias = Pair | Chat | Text


@dataclass(frozen=True)
class Kind:
    """A kind of data set: the columns that identify it, and the reader of its rows.

    `read` raises ConfigError for a row that cannot be used, and NothingToLearnError for one that teaches nothing.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Content]


def kind_of(row: Row, source: str) -> Kind:
    """The kind of a data set, from its first row. Raises ConfigError if the columns fit no kind."""
    for kind in KINDS:
        if set(kind.columns) <= set(row):
            return kind
    *known, last = (" + ".join(kind.columns) for kind in KINDS)
    raise ConfigError(
        f"{source} has the columns {', '.join(sorted(map(str, row)))}; supported: {', '.join(known)}, or {last}. "
        "Rename the columns to one of these."
    )


def _conversation(column: str) -> Callable[[Row], Chat]:
    def read(row: Row) -> Chat:
        _refuse_unused(row, _UNUSED_COLUMNS)
        turns = _turns(_column(row, column), column)
        system = next((row[name] for name in _SYSTEM_COLUMNS if row.get(name) not in _EMPTY), None)
        if system is not None and (not turns or turns[0].message["role"] != "system"):
            turns = (Turn({"role": "system", "content": _text(system, "the system prompt")}, False), *turns)
        return Chat(turns)

    return read


def _instruction(answer: str, context: str) -> Callable[[Row], Pair]:
    def read(row: Row) -> Pair:
        _refuse_unused(row, _UNUSED_COLUMNS + _SYSTEM_COLUMNS)
        given = row.get(context)
        template = _WITHOUT_INPUT if _is_nothing(given) or given == "" else _WITH_INPUT
        extra = "" if template is _WITHOUT_INPUT else _text(given, f"the column {context!r}")
        instruction = _prompt(row, "instruction")
        return Pair(template.format(instruction=instruction, input=extra), _response(row, answer))

    return read


def _completion(row: Row) -> Content:
    _refuse_unused(row, (*_UNUSED_COLUMNS, *_SYSTEM_COLUMNS, "label"))  # a label says which completions are bad ones
    prompt, completion = _column(row, "prompt"), _column(row, "completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return Pair(_prompt(row, "prompt"), _response(row, "completion"))
    if _is_nothing(completion):
        raise NothingToLearnError("no response")
    asked = [Turn(turn.message, False) for turn in _turns(prompt, "prompt", learned=False)]
    return Chat((*asked, *_turns(completion, "completion")))


def _plain(row: Row) -> Text:
    text = row.get("text")
    if _is_nothing(text) or (isinstance(text, str) and not text.strip()):
        raise NothingToLearnError("no text")
    return Text(_text(text, "the column 'text'"))


KINDS = (
    Kind("chat", ("messages",), _conversation("messages")),
    Kind("sharegpt", ("conversations",), _conversation("conversations")),
    Kind("alpaca", ("instruction", "output"), _instruction("output", "input")),
    Kind("dolly", ("instruction", "response"), _instruction("response", "context")),
    Kind("completion", ("prompt", "completion"), _completion),
    Kind("text", ("text",), _plain),
)


def _turns(messages: Any, column: str, learned: bool = True) -> tuple[Turn, ...]:
    if _is_nothing(messages):
        raise NothingToLearnError(f"no {column}")
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ConfigError(
            f"the column {column!r} is {_kind_name(messages)}; expected a list of messages, each with role and "
            "content (or from and value). CSV cannot hold lists: use .jsonl."
        )
    turns = (_turn(message, f"message {n} of {column!r}", learned) for n, message in enumerate(messages, 1))
    return tuple(turn for turn in turns if turn is not None)


def _turn(message: Any, where: str, learned: bool) -> Turn | None:
    """None for a system message that says nothing."""
    if not isinstance(message, Mapping):
        raise ConfigError(f"{where} is {_kind_name(message)}; expected an object with role and content.")
    role, content = _role(message, where), message.get("content", message.get("value"))
    for name in ("tool_calls", "function_call"):
        if message.get(name) not in _EMPTY:
            raise ConfigError(f"{where} holds {name}, which cannot be trained here; write the call into its content.")
    learned = learned and role == "assistant" and message.get("train") is not False and message.get("weight") != 0
    text = "" if _is_nothing(content) else _content(content, where)
    if role == "system" and not text:
        return None
    if learned and not text.strip():
        raise NothingToLearnError("no response")
    if role == "user" and _is_nothing(content):
        raise NothingToLearnError("no prompt")
    return Turn({**_extras(message, where), "role": role, "content": text}, learned)


def _role(message: Mapping[str, Any], where: str) -> str:
    role = message.get("role", message.get("from"))
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        given = "has no role" if role is None else f"has the role {str(role)[:40]!r}"
        raise ConfigError(f"{where} {given}; supported: {', '.join(_ROLES)}.")
    return known


def _content(content: Any, where: str) -> str:
    """Text, or the texts of a list of parts in the style of OpenAI."""
    if not isinstance(content, list):
        return _text(content, f"the content of {where}")
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        raise ConfigError(f"the content of {where} holds parts that are not text; only text can be trained here.")
    return "".join(_text(part.get("text"), f"a part of {where}") for part in content)


def _extras(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """Text that templates may use in addition to role and content, such as a name or thoughts."""
    own = ("role", "content", "from", "value")
    return {k: _text(v, f"{k} of {where}") for k, v in message.items() if k not in own and isinstance(v, str)}


def _prompt(row: Row, column: str) -> str:
    value = _column(row, column)
    if _is_nothing(value):
        raise NothingToLearnError("no prompt")
    return _text(value, f"the column {column!r}")


def _response(row: Row, column: str) -> str:
    value = _column(row, column)
    if _is_nothing(value) or (isinstance(value, str) and not value.strip()):
        raise NothingToLearnError("no response")
    return _text(value, f"the column {column!r}")


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise ConfigError(f"it has no column {name!r}.")
    return row[name]


def _text(value: Any, where: str) -> str:
    """Numbers are text as JSON writes them; nothing else is."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} is {_kind_name(value)}; expected text.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} is the number {value}; expected text.")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} holds half a character (a lone surrogate, at position {error.start}); remove or repair it."
        ) from error
    return text


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _kind_name(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _refuse_unused(row: Row, columns: Sequence[str]) -> None:
    for name in columns:
        if row.get(name) not in _EMPTY and not _is_nothing(row.get(name)):
            raise ConfigError(
                f"the column {name!r} would not be trained on; put what it says into the other columns, or remove it."
            )
