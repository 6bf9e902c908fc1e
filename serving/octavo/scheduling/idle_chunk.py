"""How many prompt tokens a step may take while nobody waits for a next token. Pure."""

from __future__ import annotations

SECONDS = 0.5  # of such a step: whoever comes meanwhile waits for its end
FEWEST_MEASURED = 64  # tokens of a step that says how fast prompts are


class IdleChunk:
    """As many tokens as were measured to take `SECONDS`, from `least` (until something is measured) to `most`."""

    def __init__(self, *, least: int, most: int) -> None:
        self.tokens = least
        self._least, self._most = least, max(least, most)
        self._per_token = 0.0  # seconds, a moving mean

    def measured(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        if num_tokens < FEWEST_MEASURED or seconds <= 0.0 or self._most == self._least:
            return
        per_token = seconds / num_tokens
        self._per_token += (per_token - self._per_token) * (0.2 if self._per_token else 1.0)
        self.tokens = min(max(int(SECONDS / self._per_token), self._least), self._most)
