"""What followed the last time: an index of n-grams over the tokens of one sequence. Engine thread only.

It grows with the sequence, a constant amount of work per token. A lookup compares a handful of earlier places, so it
costs the same for any length. It knows nothing of steps, costs or whether a guess was any good.
"""

from __future__ import annotations

from array import array

NGRAM = 3  # tokens that must agree for a place to count as a match
LONGEST = 24  # tokens of a match that are told apart
CANDIDATES = 6  # earlier places that a lookup compares, newest first

_BITS = 21
_MASK = (1 << (_BITS * NGRAM)) - 1  # a collision of ids above 2^21 costs a wrong guess, nothing else


class NgramIndex:
    """Where each n-gram ended before. About 30 bytes per token, and 100 more for each n-gram that is new."""

    __slots__ = ("_before", "_key", "_last")

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # n-gram to the newest place where it ends
        self._before = array("i")  # place to the one before of the same n-gram, -1: none
        self._key = 0  # of the n-gram that ends at the newest place

    @property
    def num_indexed(self) -> int:
        return len(self._before)

    def extend(self, token_ids: list[int], *, most: int) -> bool:
        """Take in up to `most` more tokens. Whether all but the last one are in, so that `lookup` may be asked."""
        first = len(self._before)
        stop = min(len(token_ids) - 1, first + most)
        key, last, before = self._key, self._last, self._before
        for place in range(first, stop):
            key = ((key << _BITS) | token_ids[place]) & _MASK
            if place < NGRAM - 1:
                before.append(-1)
            else:
                before.append(last.get(key, -1))
                last[key] = place
        self._key = key
        return stop == len(token_ids) - 1

    def lookup(self, token_ids: list[int], count: int) -> tuple[int, list[int]]:
        """The length of the longest earlier match of the end of `token_ids`, newest first, and `count` tokens that
        followed it. (0, []) without a match. Past the end of what is known the match repeats itself.
        """
        key = ((self._key << _BITS) | token_ids[-1]) & _MASK
        place = self._last.get(key, -1)
        best, where = 0, -1
        for _ in range(CANDIDATES):
            if place < 0:
                break
            length = _common_end(token_ids, place)
            if length > best:
                best, where = length, place
                if best == LONGEST:
                    break
            place = self._before[place]
        if best < NGRAM:
            return 0, []
        follows = token_ids[where + 1 : where + 1 + count]
        while len(follows) < count:
            follows += follows[: count - len(follows)]
        return best, follows


def _common_end(token_ids: list[int], place: int) -> int:
    """How many tokens up to `place` equal those up to the end, at most LONGEST."""
    newest = len(token_ids) - 1
    length = 0
    while length < LONGEST and length <= place and token_ids[place - length] == token_ids[newest - length]:
        length += 1
    return length
