"""Requests that were running when engines died are retried alone: one of them may be what kills.

Pure state under the registry's lock; it submits nothing itself. A sequence that was running in two engine deaths is a
suspect. Suspects run one at a time and nobody else meanwhile, until each has shown a few new tokens, or has ended. One
that was running alone in a third death is given up, so the others go on.
"""

from __future__ import annotations

from collections.abc import Iterable

from octavo.frontend.state import SequenceState

SUSPECT_DEATHS = 2
MAX_DEATHS = 3
PROOF_TOKENS = 4  # past the place where it died: the death was not of its making


class Quarantine:
    """The suspects, in the order in which they are tried."""

    def __init__(self) -> None:
        self._suspects: list[SequenceState] = []

    def __bool__(self) -> bool:
        return bool(self._suspects)

    @property
    def current(self) -> SequenceState:
        """The suspect whose turn it is."""
        return self._suspects[0]

    def count_death(self, running: Iterable[SequenceState]) -> None:
        """An engine died while these were running in it."""
        for sequence in running:
            sequence.num_deaths += 1

    def begin(self, sequences: Iterable[SequenceState]) -> None:
        """A new engine is there for all of these: who of them is a suspect?"""
        self._suspects = [sequence for sequence in sequences if sequence.num_deaths == SUSPECT_DEATHS]

    def is_guilty(self, sequence: SequenceState) -> bool:
        return sequence.num_deaths >= MAX_DEATHS

    def clears(self, sequence: SequenceState) -> bool:
        """Whether the current suspect has come past the place of its deaths; it is a suspect no longer then."""
        if not self._suspects or self._suspects[0] is not sequence:
            return False
        if len(sequence.received) - sequence.num_at_submit < PROOF_TOKENS:
            return False
        sequence.num_deaths = SUSPECT_DEATHS - 1
        del self._suspects[0]
        return True

    def discard(self, sequence: SequenceState) -> None:
        """It has ended."""
        if sequence in self._suspects:
            self._suspects.remove(sequence)
