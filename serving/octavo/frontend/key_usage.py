"""What each API key has used: numbers by a short digest of the key, never by the key. Guarded by the registry's lock.

The gateway names keys by the start of their digest; raw gRPC may say anything, so the number of names is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

SHOWN = 12  # characters of a digest: enough to tell keys apart, of no use to anyone
MAX_NAMES = 256
NOBODY, OTHERS = "none", "others"


@dataclass
class Usage:
    """Of one key, since the front end's start."""

    requests: int = 0  # accepted
    refused: int = 0  # because the queue was full
    prompt_tokens: int = 0
    generation_tokens: int = 0


class KeyUsage:
    """See the module."""

    def __init__(self) -> None:
        self._by_name: dict[str, Usage] = {}

    def of(self, key: str | None) -> Usage:
        """The numbers of a key, to be changed in place."""
        name = NOBODY if not key else "".join(c for c in key[:SHOWN] if c.isascii() and c.isalnum()) or OTHERS
        if name not in self._by_name and len(self._by_name) >= MAX_NAMES:
            name = OTHERS
        return self._by_name.setdefault(name, Usage())

    def items(self) -> list[tuple[str, Usage]]:
        """All of them, by name."""
        return sorted(dict(self._by_name).items())
