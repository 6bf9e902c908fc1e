"""How often a child died lately, and whether it makes sense to start it once more. Node's event loop."""

from __future__ import annotations

from collections import deque

DEATH_WINDOW = 60.0
FIRST_PAUSE = 0.1  # seconds before the next start; twice that after each further death. All of them must fit into the
# time in which a process is promised to be back: what never gets better is ended by the limit, not by long pauses.


class Deaths:
    """Recent deaths of one child: how long to wait before the next start, or that it is enough."""

    def __init__(self) -> None:
        self._times: deque[float] = deque()
        self.total = 0
        self.last = ""  # how the last one came, in words

    def record(self, now: float, *, limit: int, served_at: float = 0.0) -> float | None:
        """Seconds to wait before a restart; None after `limit` deaths within the window.

        `served_at`: when a request last ended as it should. Deaths before that are no loop.
        """
        self.total += 1
        self._times.append(now)
        while now - self._times[0] > DEATH_WINDOW or self._times[0] < served_at < now:
            self._times.popleft()
        if len(self._times) >= limit:
            return None
        return FIRST_PAUSE * 2.0 ** (len(self._times) - 1)
