"""How many may wait, and whose they are. Guarded by the registry's lock.

The bound counts sequences that were accepted and that the engine does not run yet. Locally that is the larger of two
sound numbers: all sequences in flight less BATCH_SIZE (no engine runs more than that), and what the engine itself last
called waiting, as far as these sequences never gave a token (preempted ones did).

One client can fill the queue but not keep it: who is refused with less than an equal share of the queue waiting has a
claim for some seconds, and meanwhile the places that become free go to clients below their share. Nobody is put out
for that, and no more than MAX_CACHED_TASK_NUM ever wait. Who waits takes turns by client (the scheduler's queue).
"""

from __future__ import annotations

from collections import Counter

CLAIM_SECONDS = 10.0  # for clients that come back after Retry-After, and some time later if they are many


class QueueBound:
    """Counts the sequences of each client (a key, or an address) from their admission on."""

    def __init__(self, *, batch_size: int, max_waiting: int) -> None:
        self.max_waiting = max(0, max_waiting)
        self._batch_size = batch_size
        self._num_all = 0
        self._unstarted: Counter[str] = Counter()  # by client; none is 0
        self._num_unstarted = 0
        self._claims: dict[str, float] = {}  # client to when it ends

    def enter(self, client: str) -> None:
        self._num_all += 1
        self._num_unstarted += 1
        self._unstarted[client] += 1
        self._claims.pop(client, None)

    def start(self, client: str) -> None:
        """One of its sequences gave its first token."""
        self._num_unstarted -= 1
        self._unstarted[client] -= 1
        if not self._unstarted[client]:
            del self._unstarted[client]

    def leave(self, client: str, *, started: bool) -> None:
        if not started:
            self.start(client)
        self._num_all -= 1

    def clear(self) -> None:
        self._num_all = self._num_unstarted = 0
        self._unstarted.clear()

    def num_waiting(self, told: int) -> int:
        """`told`: what the engine last called waiting."""
        return max(self._num_all - self._batch_size, min(told, self._num_unstarted), 0)

    def admits(self, client: str, count: int, *, told: int, now: float) -> bool:
        """Whether a client may have `count` more sequences."""
        waiting = self.num_waiting(told)
        after = max(self._num_all + count - self._batch_size, waiting + count if waiting else 0)
        self._claims = {name: end for name, end in self._claims.items() if end > now}
        if self._claims.keys() - {client} and after > 0 and not self._within_share(client, count):
            return False
        return after <= self.max_waiting

    def refused(self, client: str, count: int, *, now: float) -> None:
        """It was not admitted: places that become free are not for clients with more waiting than it may have."""
        if self._within_share(client, count):
            self._claims[client] = now + CLAIM_SECONDS

    def _within_share(self, client: str, count: int) -> bool:
        """Whether it has, with `count` more, no more than an equal share waiting; of a queue with less than one place a
        client there is none.
        """
        clients = {client, *self._unstarted, *self._claims}
        return self._unstarted[client] + count <= self.max_waiting // len(clients)
