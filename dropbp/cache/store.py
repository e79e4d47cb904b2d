"""Stores states in host memory."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import psutil
import torch

from dropbp.cache.rows import KEY_BYTES

SHARE_OF_MEMORY = 0.5  # of the free memory, unless a limit is given


class RowState(NamedTuple):
    """The stream of one row at a border, that is, after so many blocks."""

    border: int
    values: torch.Tensor


class Store(Protocol):
    """Holds one state for each row, up to `limit` bytes.

    `full`: a state was rejected for lack of space. `trouble`: why nothing more can be stored; None if all is well.
    """

    limit: int | None
    full: bool
    trouble: str | None

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def nbytes(self) -> int:
        """Bytes that the states take."""

    def open_border(self, border: int) -> None:
        """Note that states up to a border are valid now."""

    def border(self, key: bytes) -> int:
        """The border of a row's state; 0 if there is none."""

    def get(self, key: bytes) -> RowState | None:
        """A row's state; None if there is none, or if it is damaged."""

    def put(self, key: bytes, state: RowState) -> None:
        """Store a state, replacing an earlier one."""

    def drop_above(self, border: int) -> None:
        """Forget the states above a border, because a block below them has changed."""

    def close(self) -> None:
        """Free everything."""


class MemoryStore:
    """States in host memory, up to a limit in bytes. No state is evicted for another.

    In an epoch every row occurs once before any occurs again, so eviction would remove exactly the rows needed next.
    """

    def __init__(self, limit: int | None = None) -> None:
        free = psutil.virtual_memory().available
        self.limit: int | None = int(free * SHARE_OF_MEMORY) if limit is None else limit
        self.nbytes = 0
        self.full = False
        self.trouble: str | None = None
        self._states: dict[bytes, RowState] = {}

    @property
    def rows(self) -> int:
        return sum(len(key) == KEY_BYTES for key in self._states)  # without states of padding

    def open_border(self, border: int) -> None:
        """Does nothing: no other process stores states here."""

    def border(self, key: bytes) -> int:
        state = self._states.get(key)
        return 0 if state is None else state.border

    def get(self, key: bytes) -> RowState | None:
        return self._states.get(key)

    def put(self, key: bytes, state: RowState) -> None:
        before = self._states.get(key)
        more = state.values.nbytes - (0 if before is None else before.values.nbytes)
        if self.limit is not None and self.nbytes + more > self.limit:
            self.full = True
            return
        self._states[key] = state
        self.nbytes += more

    def drop_above(self, border: int) -> None:
        self._states = {key: state for key, state in self._states.items() if state.border <= border}
        self.nbytes = sum(state.values.nbytes for state in self._states.values())

    def close(self) -> None:
        self._states, self.nbytes = {}, 0
