"""Sends a request through the gateway whenever readiness says 200. One that fails shows that readiness lied."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from chaos.scoreboard import Row
from octavo_client import Client, Options
from server.conftest import Server

PAUSE_SECONDS = 0.1
MAX_RUNNING = 16
BODY = {"text": "hello, llm", "max_dec_len": 2, "timeout": 100}


@contextmanager
def probing(server: Server, row: Row, *, cuts: bool = False) -> Iterator[None]:
    """Probe meanwhile, and count the lies. `cuts`: gateways die, so a connection may break."""
    with Prober(server) as prober:
        yield
    print("lies:", prober.lies, "cut:", prober.cut)
    row.probes, row.lies = prober.num_sent, len(prober.lies) + (0 if cuts else len(prober.cut))


class Prober:
    """Runs while its `with` lasts. `cut`: requests whose own connection broke, each repeated through our client."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.num_sent = 0
        self.lies: list[str] = []
        self.cut: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_RUNNING)
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for _ in range(MAX_RUNNING):
            assert self._slots.acquire(timeout=120), "a probe never ended"

    def _run(self) -> None:
        with httpx.Client(timeout=5, trust_env=False) as http:
            while not self._stop.wait(PAUSE_SECONDS):
                try:
                    ready = http.get(f"{self._server.health}/v2/health/ready").status_code == 200
                except httpx.HTTPError:
                    ready = False
                if ready and self._slots.acquire(blocking=False):
                    threading.Thread(target=self._probe, args=(next(self._numbers),), daemon=True).start()

    def _probe(self, number: int) -> None:
        began = time.monotonic()
        try:
            with httpx.Client(timeout=110, trust_env=False) as http:
                answer = http.post(f"{self._server.gateway}/v1/chat/completions", json=BODY)
            if answer.status_code not in (200, 429):
                self._note(self.lies, f"probe {number}: {answer.status_code} {answer.text[:200]}", began)
        except httpx.HTTPError as error:
            self._note(self.cut, f"probe {number}: {type(error).__name__} {error}", began)
            self._repeat(number, began)
        finally:
            with self._lock:
                self.num_sent += 1
            self._slots.release()

    def _repeat(self, number: int, began: float) -> None:
        try:
            with Client(self._server.gateway) as client:
                client.generate("hello, llm", options=Options(max_dec_len=2))
        except Exception as error:
            self._note(self.lies, f"probe {number} through the client: {type(error).__name__} {error}", began)

    def _note(self, where: list[str], what: str, began: float) -> None:
        with self._lock:
            where.append(f"{what} (after {time.monotonic() - began:.1f} s)")
