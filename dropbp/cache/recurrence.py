"""Notices that rows do not recur, for example because each epoch packs or augments them in another way.

A trainer reports the end of its epochs. In one's own loop the finished share of the run takes its place: in a run of
two epochs or more, rows have recurred by its middle.
"""

from __future__ import annotations

FEW = 0.1  # share of rows that may recur by chance, such as rows that fill a pack by themselves
PAST_THE_MIDDLE = 0.55  # share of the run


class Recurrence:
    """Counts rows of training forwards, from the last of the `epochs` on that a trainer has reported."""

    def __init__(self) -> None:
        self._rows = self._stored = self._hits = self.epochs = 0
        self._begin: float | None = None

    def note(self, rows: int, stored: int, hits: int, share: float | None, full: bool) -> str | None:
        """Count the rows of a training forward. Return the reason if rows turn out not to recur.

        `stored` of the rows had states, and `hits` started at the border. `share` is the finished share of the run
        (None: unknown); `full` says whether rows were left out for lack of space.
        """
        self._rows, self._stored, self._hits = self._rows + rows, self._stored + stored, self._hits + hits
        if share is None or self.epochs:
            return None
        self._begin = share if self._begin is None else self._begin
        if share - self._begin < PAST_THE_MIDDLE or not self._missing(full):
            return None
        return "no row came again up to the middle of the run: it has less than two epochs, or packs rows anew in each"

    def end_epoch(self, full: bool) -> str | None:
        """Note the end of an epoch. Return the reason if its rows did not occur in an earlier one."""
        missing = self.epochs > 0 and self._missing(full)
        self._rows = self._stored = self._hits = 0
        self.epochs += 1
        return "no row of this epoch occurred in the one before: packed rows differ in each epoch" if missing else None

    def _missing(self, full: bool) -> bool:
        return bool(self._rows and not self._hits and self._stored <= (0 if full else FEW * self._rows))
