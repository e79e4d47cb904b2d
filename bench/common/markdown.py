"""Markdown pages: tables, and sections between markers that are regenerated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_RULES = {"l": "---", "r": "---:"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]], align: str = "lr") -> str:
    """A table; `align` has a letter per column, left or right, the last one for all that follow."""
    rules = [_RULES[align[min(place, len(align) - 1)]] for place in range(len(head))]
    return "\n".join([_line(head), f"|{'|'.join(rules)}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(text: str, begin: str, end: str, part: str) -> str:
    """The text with the part between the markers replaced; missing markers are appended."""
    head, _, after = text.partition(begin) if begin in text else (f"{text}\n", "", "")
    _, _, tail = after.partition(end)
    return f"{head}{begin}\n\n{part}\n{end}{tail or chr(10)}"
