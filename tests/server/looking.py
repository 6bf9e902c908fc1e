"""Something that is looked at again and again in a thread of its own, while a server starts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

PAUSE_SECONDS = 0.02


@contextmanager
def looking(look: Callable[[], None]) -> Iterator[None]:
    """Call `look` every PAUSE_SECONDS while this lasts; what it raises comes out at the end."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(PAUSE_SECONDS):
            look()

    with ThreadPoolExecutor(1) as pool:
        looks = pool.submit(work)
        try:
            yield
        finally:
            over.set()
    looks.result()
