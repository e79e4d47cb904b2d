"""Stored states in the memory of the host."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import psutil
import torch

from dropbp.cache.rows import KEY_BYTES

SHARE_OF_MEMORY = 0.5  # of what is free, unless a limit is given


class State(NamedTuple):
    """What the stream is for one row at a border: after so many blocks."""

    border: int
    values: torch.Tensor


class Store(Protocol):
    """Holds one state for each row.

    Attributes:
        full: whether a state was turned away for want of room.
        trouble: why nothing more can be stored; None if nothing is wrong.
    """

    full: bool
    trouble: str | None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        ...

    @property
    def nbytes(self) -> int:
        """How many bytes the states take."""
        ...

    def reach(self, border: int) -> None:
        """States up to a border are right now."""
        ...

    def border(self, key: bytes) -> int:
        """The border of a row's state; 0 where there is none."""
        ...

    def get(self, key: bytes) -> State | None:
        """A row's state; None where there is none, or it was found damaged."""
        ...

    def put(self, key: bytes, state: State) -> None:
        """Store a state in place of an earlier one."""
        ...

    def drop_above(self, border: int) -> None:
        """Forget the states above a border: a block below them has changed."""
        ...

    def close(self) -> None:
        """Set everything free."""
        ...


class MemoryStore:
    """States in the memory of the host, up to a limit in bytes. No state is thrown out for another.

    In epochs every row comes once before the first comes again, so what was stored last would be thrown out first.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = int(psutil.virtual_memory().available * SHARE_OF_MEMORY) if limit is None else limit
        self._bytes = 0
        self.full = False
        self.trouble: str | None = None
        self._states: dict[bytes, State] = {}

    @property
    def rows(self) -> int:
        """How many rows there are, without states of padding."""
        return sum(len(key) == KEY_BYTES for key in self._states)

    @property
    def nbytes(self) -> int:
        """How many bytes the states take."""
        return self._bytes

    def reach(self, border: int) -> None:
        """Nothing is to be looked for: no other process stores here."""

    def border(self, key: bytes) -> int:
        """The border of a row's state; 0 where there is none."""
        state = self._states.get(key)
        return 0 if state is None else state.border

    def get(self, key: bytes) -> State | None:
        """A row's state; None where there is none."""
        return self._states.get(key)

    def put(self, key: bytes, state: State) -> None:
        """Store a state in place of an earlier one, if there is room."""
        before = self._states.get(key)
        more = state.values.nbytes - (0 if before is None else before.values.nbytes)
        if self._bytes + more > self.limit:
            self.full = True
            return
        self._states[key] = state
        self._bytes += more

    def drop_above(self, border: int) -> None:
        """Forget the states above a border."""
        self._states = {key: state for key, state in self._states.items() if state.border <= border}
        self._bytes = sum(state.values.nbytes for state in self._states.values())

    def close(self) -> None:
        """Set everything free."""
        self._states, self._bytes = {}, 0
