"""How many may wait, and whose they are. Guarded by the registry's lock.

The bound counts sequences that were accepted and that the engine does not run yet. Locally that is the larger of two
sound numbers: all sequences in flight less BATCH_SIZE (no engine runs more than that), and what the engine itself last
called waiting, as far as these sequences never gave a token (preempted ones did).

One client can fill the queue but not close it: beyond MAX_CACHED_TASK_NUM whoever has less than an equal share of it
waiting still gets in, until twice as many wait. Nobody is put out for that; who waits takes turns by client (the
scheduler's queue), so a client beyond its share comes back under it as its own requests run.
"""

from __future__ import annotations

from collections import Counter


class QueueBound:
    """Counts the sequences of each client (a key, or an address) from their admission on."""

    def __init__(self, *, batch_size: int, max_waiting: int) -> None:
        self.max_waiting = max(0, max_waiting)
        self._batch_size = batch_size
        self._num_all = 0
        self._unstarted: Counter[str] = Counter()  # by client; none is 0
        self._num_unstarted = 0

    def enter(self, client: str) -> None:
        self._num_all += 1
        self._num_unstarted += 1
        self._unstarted[client] += 1

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

    def admits(self, client: str, count: int, *, told: int) -> bool:
        """Whether a client may have `count` more sequences."""
        waiting = self.num_waiting(told)
        after = max(self._num_all + count - self._batch_size, waiting + count if waiting else 0)
        if after <= self.max_waiting:
            return True
        clients = len(self._unstarted) + (client not in self._unstarted)
        share = self.max_waiting // clients  # none of a queue with less than one place a client
        return clients > 1 and after <= 2 * self.max_waiting and self._unstarted[client] + count <= share
