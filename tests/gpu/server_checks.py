"""What a server shows with several streams at once, whichever way it is asked; on a card or, at toy sizes, without.

`front_end` is a front end in this process over an engine in a process of its own, `gateway` the whole server through
gateway and Triton. Both answer `ServerChecks`, which test files put their own fixtures under.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from gpu_server import Node, node

if TYPE_CHECKING:
    from frontend.conftest import Inbox

Body = dict[str, Any]
SECONDS = 60.0  # that an answer may take
LOAD_SECONDS = 120.0
TOKENS, LONG = 24, 6000  # of an answer, and of one that is given up
SIZES = {"BATCH_SIZE": "16", "MAX_SEQ_LEN": "1024", "MAX_DEC_LEN": "8000"}


class Service(Protocol):
    """A server that runs."""

    def ask(self, body: Body) -> list[int]:
        """The tokens of a whole answer."""
        ...

    def give_up(self, body: Body, held: Callable[[], None]) -> None:
        """Begin a stream; once it has said something, call `held` and go away."""
        ...

    def page(self) -> str:
        """The front end's numbers, in Prometheus' text format."""
        ...


class InProcess:
    """A front end in this process."""

    def __init__(self, send: Callable[[bytes, Inbox], None], make_inbox: Callable[[], Inbox]) -> None:
        self._submit = send
        self._make_inbox = make_inbox

    def ask(self, body: Body) -> list[int]:
        messages = self._send(body).all(SECONDS)
        assert not any("error_msg" in message for message in messages), messages[-1]
        return [token for message in messages for token in message["token_ids"]]

    def give_up(self, body: Body, held: Callable[[], None]) -> None:
        inbox = self._send(body)
        assert not inbox.next(SECONDS)["is_end"]
        held()
        inbox.gone.set()

    def page(self) -> str:
        return str(self.op("metrics")["text"])

    def op(self, name: str) -> dict[str, Any]:
        return self._send({"op": name}).all(SECONDS)[0]

    def _send(self, body: Body) -> Inbox:
        inbox = self._make_inbox()
        self._submit(json.dumps([body]).encode(), inbox)
        return inbox


class OverHttp:
    """A server behind its gateway."""

    def __init__(self, found: Node) -> None:
        self._node = found

    def ask(self, body: Body) -> list[int]:
        given = json.dumps({**body, "return_all_tokens": True}).encode()
        request = Request(f"{self._node.url}/v1/completions", given, {"Content-Type": "application/json"})
        with urlopen(request, timeout=SECONDS) as answer:
            return json.loads(answer.read())["tokens_all_ids"]

    def give_up(self, body: Body, held: Callable[[], None]) -> None:
        connection = HTTPConnection(urlsplit(self._node.url).netloc, timeout=SECONDS)
        given = json.dumps({**body, "stream": True})
        connection.request("POST", "/v1/completions", given, {"Content-Type": "application/json"})
        assert not json.loads(connection.getresponse().readline())["is_end"]
        held()
        connection.close()

    def page(self) -> str:
        with urlopen(self._node.metrics, timeout=SECONDS) as answer:
            return answer.read().decode()


@contextmanager
def front_end(folder: Path, run_dir: Path, **variables: str) -> Iterator[InProcess]:
    """A front end in this process that has started an engine and is ready."""
    from frontend.conftest import Inbox
    from octavo.frontend.frontend import FrontEnd
    from octavo.settings import Settings

    places = {"MODEL_DIR": str(folder), "RUN_DIR": str(run_dir), "INFER_QUEUE_PORT": str(_free_port())}
    with pytest.MonkeyPatch.context() as patch:  # the engine inherits it
        patch.delenv("OCTAVO_NODE", raising=False)
        for name, value in (places | SIZES | variables).items():
            patch.setenv(name, value)
        made = FrontEnd(Settings.from_environ())
    try:
        service = InProcess(lambda raw, inbox: made.submit(raw, uuid4().hex, inbox), Inbox)
        _wait_ready(service)
        yield service
    finally:
        made.finalize()


@contextmanager
def gateway(folder: Path, *, device: str) -> Iterator[OverHttp]:
    """The whole server, ready."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAX_DEC_LEN", SIZES["MAX_DEC_LEN"])
        batch_size, longest = int(SIZES["BATCH_SIZE"]), int(SIZES["MAX_SEQ_LEN"])
        with node(folder, device=device, batch_size=batch_size, longest=longest) as found:
            yield OverHttp(found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_ready(service: InProcess) -> None:
    limit = time.monotonic() + LOAD_SECONDS
    while (info := service.op("info"))["state"] != "ready":
        assert info["state"] != "down", info["reason"]
        assert time.monotonic() < limit, f"not ready after {LOAD_SECONDS:.0f} s: {info['progress']} {info['reason']}"
        time.sleep(0.05)


def number(service: Service, name: str) -> float:
    """A figure of the server's page."""
    found = re.search(rf"^octavo_{name} (\S+)$", service.page(), re.MULTILINE)
    assert found, f"no octavo_{name}"
    return float(found[1])


def wait_for(condition: Callable[[], bool], what: str) -> None:
    limit = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.05)


def request(index: int) -> Body:
    """Prompts of 20 to 300 tokens, greedy and sampled, some with penalties or log probabilities."""
    body: Body = {
        "input_ids": [3 + (7 * index + i) % 500 for i in range(20 + 40 * index)], "max_dec_len": TOKENS,
        "infer_seed": index, "temperature": 0.9 * (index % 3), "topp": 0.9, "ignore_eos": True,
    }  # fmt: skip
    if index % 4 == 1:
        body |= {"penalty_score": 1.2, "frequency_score": 0.3}
    return body | ({"logprobs": 3} if index == 5 else {})


class ServerChecks:
    """Test classes inherit these; a fixture `service` gives the server."""

    def test_streams_at_once_say_what_each_says_alone(self, service: Service) -> None:
        alone = [service.ask(request(index)) for index in range(8)]
        with ThreadPoolExecutor(16) as pool:
            crowd = list(pool.map(lambda index: service.ask(request(index % 8)), range(16)))
        assert crowd == alone * 2
        assert all(len(tokens) == TOKENS for tokens in alone)
        assert len({tuple(tokens) for tokens in alone}) == 8

    def test_the_same_request_twice_gives_the_same_tokens(self, service: Service) -> None:
        for index in (2, 5):
            assert service.ask(request(index)) == service.ask(request(index))

    def test_a_stream_that_is_given_up_gives_its_blocks_back(self, service: Service) -> None:
        wait_for(lambda: number(service, "blocks_used") == 0, "blocks of answers that have ended are in use")
        before = number(service, "generation_tokens_total")

        def held() -> None:
            wait_for(lambda: number(service, "blocks_used") > 0, "no block is in use")

        service.give_up({**request(1), "max_dec_len": LONG}, held)
        wait_for(lambda: number(service, "blocks_used") == 0, "its blocks are in use still")
        assert number(service, "generation_tokens_total") - before < LONG
        assert len(service.ask(request(1))) == TOKENS
