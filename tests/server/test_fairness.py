"""Whose turn it is, over HTTP: shares of the queue by key, priorities in both dialects."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from server.conftest import Server, make_server

pytestmark = [pytest.mark.server, pytest.mark.slow]

BATCH, QUEUE = 2, 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sizes = {"BATCH_SIZE": str(BATCH), "MAX_CACHED_TASK_NUM": str(QUEUE), "MAX_DEC_LEN": "8000"}
    made = make_server(tmp_path_factory.mktemp("fair"), API_KEYS="greedy,modest", **sizes)
    started = made.script("start_server.sh")
    assert started.returncode == 0, started.stdout + started.stderr
    yield made
    assert made.script("stop_server.sh").returncode == 0


class Client:
    """Asks in threads and notes when each answer came."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._pool = ThreadPoolExecutor(BATCH + QUEUE + 8)

    def ask(self, key: str, num_tokens: int, *, path: str = "/v1/completions", **body: object
            ) -> Future[tuple[httpx.Response, float]]:
        limits = {"max_tokens": num_tokens, "min_tokens": num_tokens} if "prompt" in body else {
            "text": "x", "max_dec_len": num_tokens, "min_dec_len": num_tokens}
        asked = {**limits, "ignore_eos": True, **body}
        headers = {"authorization": f"Bearer {key}"}

        def send() -> tuple[httpx.Response, float]:
            answer = httpx.post(self._server.gateway + path, json=asked, headers=headers, timeout=120, trust_env=False)
            return answer, time.monotonic()

        return self._pool.submit(send)

    def wait(self, *, waiting: int) -> None:
        """Until the batch is full and so many wait behind it."""
        end = time.monotonic() + 30
        seen = self._front_end()
        while (seen["running"], seen["waiting"]) != (BATCH, waiting):
            assert time.monotonic() < end, seen
            time.sleep(0.01)
            seen = self._front_end()

    def _front_end(self) -> dict[str, int]:
        health = httpx.get(f"{self._server.health}/v2/health", trust_env=False).json()
        return health["frontend"]


def test_a_client_that_fills_the_queue_does_not_keep_another_out(server: Server) -> None:
    """Full is full for everybody, but what becomes free is not for the one who has it all."""
    client = Client(server)
    crowd = [client.ask("greedy", 600) for _ in range(BATCH + QUEUE)]
    client.wait(waiting=QUEUE)
    refused, _ = client.ask("modest", 10).result()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    (answer, at), num_refused = insist(client, "modest")
    assert answer.status_code == 200, answer.text
    assert num_refused["greedy"], "it was refused though there were free places"
    ends = [future.result() for future in crowd]
    assert {one.status_code for one, _ in ends} == {200}, "nobody who is in is put out"
    assert all(one.json()["tokens_all_num"] == 600 for one, _ in ends)
    assert sum(end < at for _, end in ends) <= 4 * BATCH, "it had the next turn after the first free place"


def insist(client: Client, key: str) -> tuple[tuple[httpx.Response, float], Counter[str]]:
    """Ask until admitted, with a greedy client that tries again just before each time."""
    num_refused: Counter[str] = Counter()
    while True:
        more, _ = client.ask("greedy", 1).result()
        num_refused["greedy"] += more.status_code == 429
        answer, at = client.ask(key, 10).result()
        if answer.status_code != 429:
            return (answer, at), num_refused
        num_refused[key] += 1


def test_priorities_go_first_in_both_dialects(server: Server) -> None:
    client = Client(server)
    running = [client.ask("greedy", 7900) for _ in range(BATCH)]
    client.wait(waiting=0)
    patient = [client.ask("greedy", 200) for _ in range(6)]
    client.wait(waiting=6)
    urgent = [
        client.ask("greedy", 200, priority=-5),
        client.ask("greedy", 200, priority=-5, path="/v1/completions", prompt="x", model="any"),
    ]
    client.wait(waiting=8)
    late = [client.ask("greedy", 200, priority=5)]
    for future in [*running, *patient, *urgent, *late]:
        assert future.result()[0].status_code == 200, future.result()[0].text
    assert "choices" in urgent[1].result()[0].json(), "the second one is OpenAI's"
    ends = {name: [future.result()[1] for future in group]
            for name, group in (("urgent", urgent), ("patient", patient), ("late", late))}
    assert max(ends["urgent"]) < min(ends["patient"])
    assert max(ends["patient"]) < min(ends["late"])


@pytest.mark.parametrize("priority", [101, -101, "high", 0.5])
def test_a_priority_that_is_none_is_refused_by_name(server: Server, priority: object) -> None:
    client = Client(server)
    for body in ({"priority": priority}, {"priority": priority, "prompt": "x", "model": "any"}):
        answer, _ = client.ask("modest", 1, **body).result()
        assert answer.status_code == 400
        assert "priority" in answer.text
