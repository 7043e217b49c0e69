"""Token sequences that an output may not have, and several rules on one output
together."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class TokenMatcher(Protocol):
    """Follows one output, and says which tokens may come next; masks are as in
    :class:`~maxlm.inference.grammar.GrammarMatcher`."""

    @property
    def is_finished(self) -> bool:
        """Whether nothing but an end-of-text token may follow, or ``error`` is set."""
        ...

    @property
    def error(self) -> str | None:
        """Why the output can neither go on nor end as asked."""
        ...

    def fill_mask(self, row: NDArray[np.uint32]) -> None:
        """Writes the mask of the tokens that may come next."""
        ...

    def accept(self, token: int) -> bool:
        """Goes on by a token; returns whether it may come here."""
        ...

    def copy(self) -> "TokenMatcher":
        """Returns a matcher at the same place that goes on by itself."""
        ...


def fill_draft_masks(
    matcher: TokenMatcher, rows: NDArray[np.uint32], draft: Sequence[int]
) -> None:
    """Writes the masks [G + 1, words] of the next token and of those behind each of a
    draft's G tokens; behind one that may not come there, masks with all bits set. The
    matcher stays where it is."""
    rows[:] = np.iinfo(np.uint32).max
    ahead = matcher.copy()  # no rollback undoes an error that a wrong draft runs into
    ahead.fill_mask(rows[0])
    for token, row in zip(draft, rows[1:], strict=True):
        if not ahead.accept(token):
            break
        ahead.fill_mask(row)


class BannedSequencesMatcher:
    """Forbids the last token of each sequence where the output ends in the tokens
    before it."""

    is_finished = False
    error = None

    def __init__(
        self, sequences: Sequence[tuple[int, ...]], output: tuple[int, ...] = ()
    ):
        """Begins behind ``output``, of which only as much counts as a sequence is
        long."""
        self._sequences = sequences
        self._longest = max(map(len, sequences))
        self._output = output

    def fill_mask(self, row: NDArray[np.uint32]) -> None:
        """See :class:`TokenMatcher`."""
        row[:] = np.iinfo(np.uint32).max
        for token in self._list_banned():
            if token // 32 < len(row):
                row[token // 32] &= ~np.uint32(1 << token % 32)

    def accept(self, token: int) -> bool:
        """See :class:`TokenMatcher`."""
        may_come = token not in self._list_banned()
        self._output = (*self._output, token)[-self._longest :]
        return may_come

    def copy(self) -> "BannedSequencesMatcher":
        """See :class:`TokenMatcher`."""
        return BannedSequencesMatcher(self._sequences, self._output)

    def _list_banned(self) -> set[int]:
        banned: set[int] = set()
        for *before, last in self._sequences:
            start = max(0, len(self._output) - len(before))
            if list(self._output[start:]) == before:
                banned.add(last)
        return banned


class CombinedMatcher:
    """Allows what all of its matchers allow; an output that none can continue ends with
    an ``error``.

    Args:
        stop_ids: end-of-text tokens, allowed where nothing else is.
    """

    def __init__(self, matchers: Sequence[TokenMatcher], stop_ids: Sequence[int]):
        self._matchers = matchers
        self._stop_ids = stop_ids
        self._is_stuck = False

    @property
    def is_finished(self) -> bool:
        """See :class:`TokenMatcher`."""
        return self._is_stuck or any(matcher.is_finished for matcher in self._matchers)

    @property
    def error(self) -> str | None:
        """See :class:`TokenMatcher`."""
        if self._is_stuck:
            return "no token can come next"
        for matcher in self._matchers:
            if matcher.error:
                return matcher.error
        return None

    def fill_mask(self, row: NDArray[np.uint32]) -> None:
        """See :class:`TokenMatcher`."""
        mask = np.empty_like(row)
        row[:] = np.iinfo(np.uint32).max
        for matcher in self._matchers:
            matcher.fill_mask(mask)
            row &= mask
        if not row.any():
            self._is_stuck = True
            for token in self._stop_ids:
                row[token // 32] |= np.uint32(1 << token % 32)

    def accept(self, token: int) -> bool:
        """See :class:`TokenMatcher`."""
        may_come = True
        for matcher in self._matchers:  # each goes on, whatever the others say
            may_come &= matcher.accept(token)
        return may_come

    def copy(self) -> "CombinedMatcher":
        """See :class:`TokenMatcher`."""
        other = CombinedMatcher(
            [matcher.copy() for matcher in self._matchers], self._stop_ids
        )
        other._is_stuck = self._is_stuck
        return other
