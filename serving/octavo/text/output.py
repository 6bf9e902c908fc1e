"""What a sequence has said and what of it may be sent: detokeniser and stop strings together.

Pure; one `OutputText` per sequence, used by the delivery thread alone. The rules:

- Tokens are *free* (may be sent) up to the last token border where the text is certain (no split character) and no
  suffix of the text up to it can be the beginning of a stop string. Text leaves with its tokens, never before or
  after them: who holds the first k ids has exactly the text of those k.
- A stop string counts only if a token whose number is at least `min_tokens` completes it. The text is cut where the
  stop string begins. Of the tokens that were not free, those that begin before the cut stay; those whose text begins
  at it or later go, tokens without text among them.
- All of it depends on the ids alone, not on when they came or were taken; so `replay` rebuilds it after a crash.
"""

from __future__ import annotations

from bisect import bisect_right

from octavo.text.detokenizer import Detokenizer
from octavo.text.stop import StopMatcher, StopStrings

_SPLIT = -1  # in place of a token's end: its text is not certain yet


class OutputText:
    """The output of one sequence. `token_ids` are without the end token and without what a stop string cut."""

    def __init__(self, detokenizer: Detokenizer, *, stops: StopStrings | None = None, min_tokens: int = 1) -> None:
        self._detokenizer = detokenizer
        self._text_of = detokenizer.feed
        self._matcher = StopMatcher(stops) if stops is not None else None
        self._min_tokens = min_tokens
        self.token_ids: list[int] = []
        self.num_sampled = 0  # tokens fed, those that a stop string cut included
        self.stopped_by: str | None = None
        self._free = 0  # tokens that may be sent
        self._taken = 0  # tokens that were
        self._sent: list[str] = []  # text of the taken ones
        self._ready: list[str] = []  # text of the free ones that were not taken, ...
        self._borders: list[int] = []  # ... and how many tokens are free with each piece of it
        self._held = ""  # text of the others
        self._held_from = 0  # where `_held` begins in the whole text
        self._starts: list[int] = []  # where the others begin in the whole text
        self._ends: list[int] = []  # where they end; _SPLIT if the text there is not certain

    def feed(self, token_id: int) -> bool:
        """Take one more token. True: a stop string ended the output; further tokens do not count."""
        if self.stopped_by is not None:
            return True
        self.num_sampled += 1
        self.token_ids.append(token_id)
        text = self._text_of(token_id)
        split = self._detokenizer.pending
        if self._matcher is None and not split and not self._starts:  # the common case
            self._ready.append(text)
            self._held_from += len(text)
            self._free += 1
            self._borders.append(self._free)
            return False
        self._starts.append(self._length)
        if self._grow(text):
            return True
        self._ends.append(_SPLIT if split else self._length)
        self._release()
        return False

    @property
    def _length(self) -> int:
        return self._held_from + len(self._held)

    def _grow(self, text: str) -> bool:
        """Append to the text; True if that completes a stop string."""
        begin = self._length
        self._held += text
        if self._matcher is None or not text:
            return False
        hit = self._matcher.feed(text, ignore=self.num_sampled < self._min_tokens)
        if hit is None:
            return False
        end, self.stopped_by = hit
        self._cut(begin + end - len(self.stopped_by))
        return True

    def _cut(self, position: int) -> None:
        position = max(position, self._held_from)
        self._held = self._held[: position - self._held_from]
        kept = sum(start < position for start in self._starts)
        del self.token_ids[self._free + kept :]
        self._release_all()

    def _release(self) -> None:
        """Move the border of what is free as far as the rules allow."""
        safe = self._length - (self._matcher.num_held if self._matcher is not None else 0)
        count = 0
        for index, end in enumerate(self._ends):
            if end > safe:
                break
            if end != _SPLIT:
                count = index + 1
        if not count:
            return
        border = self._ends[count - 1]
        self._ready.append(self._held[: border - self._held_from])
        self._held = self._held[border - self._held_from :]
        self._held_from = border
        self._free += count
        self._borders.append(self._free)
        del self._starts[:count], self._ends[:count]

    def _release_all(self) -> None:
        self._ready.append(self._held)
        self._held_from, self._held = self._length, ""
        self._free = len(self.token_ids)
        self._borders.append(self._free)
        self._starts.clear()
        self._ends.clear()

    def finish(self) -> bool:
        """The sequence has ended: everything is free. True if the text held back completed a stop string."""
        if self.stopped_by is None and not self._grow(self._detokenizer.flush()):
            self._release_all()
        return self.stopped_by is not None

    def replay(self, token_ids: list[int]) -> bool:
        """Take tokens that were sent before a crash, with their text. True: a stop string ends them."""
        stopped = any(self.feed(token_id) for token_id in token_ids)
        if not stopped:
            self._release_all()
        self.take()
        return stopped

    @property
    def has_free(self) -> bool:
        """There are tokens to take."""
        return self._free > self._taken

    @property
    def num_free(self) -> int:
        """Tokens to take."""
        return self._free - self._taken

    def take(self, limit: int | None = None) -> tuple[str, list[int], int]:
        """Text and ids that may be sent and were not yet, and the number of the first of those ids.

        With a `limit` about so many tokens: more where the text of a token is only known with that of later ones.
        """
        first, count = self._taken, len(self._ready)
        if limit is not None and self.num_free > limit:
            count = bisect_right(self._borders, max(first + limit, self._borders[0]))
        self._taken = self._borders[count - 1] if count else self._free
        text = self._ready[0] if count == 1 else "".join(self._ready[:count])
        del self._ready[:count], self._borders[:count]
        self._sent.append(text)
        return text, self.token_ids[first : self._taken], first

    @property
    def text(self) -> str:
        """All text that was taken."""
        return "".join(self._sent)
