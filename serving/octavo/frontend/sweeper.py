"""The sweeper thread: ends requests whose time is over or whose receiver gave up, waiting ones included.

Asking a sink is a blocking round trip, so each one is asked twice a second at most, spread over the turns. It owns
only `RequestState.next_check`; verdicts go through the registry to the delivery thread. Carriers are looked after in
the same turns.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from octavo.frontend.admission import Registry
from octavo.frontend.state import RequestState
from octavo.protocol.errors import Cancelled, RequestTimeout

log = logging.getLogger(__name__)

TURN_SECONDS = 0.05
QUIET_TURN_SECONDS = 0.2  # with few sinks to ask and no deadline near: each turn wakes the process
CHECK_SECONDS = 0.5
MAX_CHECKS = 40  # of sinks in one turn


class Sweeper:
    """One thread; `sweep` is one turn."""

    def __init__(self, *, registry: Registry, clock: Callable[[], float],
                 sweep_carriers: Callable[[], None] = lambda: None) -> None:
        self._registry = registry
        self._sweep_carriers = sweep_carriers
        self._clock = clock
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="octavo-sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        self._closing.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        seconds = TURN_SECONDS
        while not self._closing.wait(seconds):
            try:
                seconds = self.sweep()
            except Exception:  # the edge of this thread: deadlines and cancellations must go on
                log.exception("a turn of the sweeper failed")

    def sweep(self) -> float:
        """Look at every deadline and at the sinks whose turn it is; seconds until the next turn."""
        self._sweep_carriers()
        now = self._clock()
        due = []
        deadline = now + QUIET_TURN_SECONDS  # the earliest
        for state in self._registry.all_requests():
            if not state.generated:
                deadline = min(deadline, state.deadline)
            if now > state.deadline and not state.generated:  # else it waits for its reader
                seconds = state.request.timeout
                self._registry.post(state, RequestTimeout(f"the request's time ({seconds:g} s) is over"))
            elif now >= state.next_check:
                due.append(state)
        due.sort(key=lambda state: state.next_check)
        for state in due[:MAX_CHECKS]:
            self._check(state, now)
        return TURN_SECONDS if len(due) > MAX_CHECKS else max(TURN_SECONDS, deadline - now)

    def _check(self, state: RequestState, now: float) -> None:
        state.next_check = now + CHECK_SECONDS
        if state.sink.cancelled():
            self._registry.post(state, Cancelled("the receiver gave up"))
