"""Both clients over a scripted transport, and over real HTTP with a server that dies in mid-stream."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from octavo_client import AsyncClient, ChatHistory, Client, InvalidRequest, Options, TransportLost
from octavo_client.transport import split_url

Json = dict[str, object]
TEXT = ["Hel", "lo", " wor", "ld"]


def message(index: int) -> Json:
    last = index == len(TEXT) - 1
    out: Json = {
        "token": TEXT[index],
        "token_ids": [index],
        "send_idx": index,
        "is_end": int(last),
        "error_msg": "",
        "error_code": 0,
    }
    return {**out, "finish_reason": "stop"} if last else out


class Scripted:
    """A transport that gives up after as many messages as the script says, once per attempt."""

    def __init__(self, script: list[int]) -> None:
        self.script = script
        self.requests: list[Json] = []
        self.closed = 0

    def messages(self, payload: Json) -> Iterator[Json]:
        self.requests.append(payload)
        start = payload.get("send_idx", 0)
        assert isinstance(start, int)
        count = self.script.pop(0) if self.script else len(TEXT)
        for index in range(start, min(len(TEXT), start + count)):
            yield message(index)
        if start + count < len(TEXT):
            raise TransportLost("scripted")

    def stream(self, payload: Json, *, timeout: float) -> Iterator[Json]:
        try:
            yield from self.messages(payload)
        finally:
            self.closed += 1

    def call(self, payload: Json, *, timeout: float) -> Json:
        return {"tokens": [1, 2], "text": "x", "aborted": True}

    def close(self) -> None:
        pass


class AsyncScripted(Scripted):
    async def stream(self, payload: Json, *, timeout: float) -> AsyncGenerator[Json, None]:  # type: ignore[override]
        try:
            for item in self.messages(payload):
                yield item
        finally:
            self.closed += 1

    async def call(self, payload: Json, *, timeout: float) -> Json:  # type: ignore[override]
        return super().call(payload, timeout=timeout)

    async def close(self) -> None:  # type: ignore[override]
        pass


def test_generate_joins_the_stream() -> None:
    answer = Client(transport=Scripted([])).generate("hi")
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("Hello world", [0, 1, 2, 3], "stop")
    assert answer.num_resumes == 0


@pytest.mark.parametrize("script", [[0], [1], [2, 1], [3, 0, 0]])
def test_a_lost_stream_goes_on_where_it_was(script: list[int]) -> None:
    losses = len(script)
    transport = Scripted(script)
    answer = Client(transport=transport).generate("hi")
    assert answer.text == "Hello world"
    assert answer.num_resumes == losses
    assert [request.get("attempt", 0) for request in transport.requests] == list(range(losses + 1))


async def test_the_async_client_resumes_too() -> None:
    transport = AsyncScripted([2, 1])
    answer = await AsyncClient(transport=transport).generate(ChatHistory(system="s").user("hi"))
    assert (answer.text, answer.num_resumes, transport.closed) == ("Hello world", 2, 3)


def test_closing_a_stream_closes_the_transport_stream() -> None:
    transport = Scripted([])
    deltas = Client(transport=transport).stream("hi")
    next(deltas)
    deltas.close()
    assert transport.closed == 1


async def test_closing_an_async_stream_closes_the_transport_stream() -> None:
    transport = AsyncScripted([])
    deltas = AsyncClient(transport=transport).stream("hi")
    await anext(deltas)
    await deltas.aclose()
    assert transport.closed == 1


@pytest.mark.parametrize(("prompt", "field"), [("a", "text"), ([1, 2], "input_ids"), ([{"role": "user"}], "messages")])
def test_the_prompts_type_chooses_the_field(prompt: object, field: str) -> None:
    transport = Scripted([])
    Client(transport=transport).generate(prompt, options=Options(stop=("x",)))  # type: ignore[arg-type]
    assert field in transport.requests[0]
    assert transport.requests[0]["stop"] == ["x"]


@pytest.mark.parametrize("prompt", [[], [True], ["a"], [1, {}]])
def test_other_prompts_are_type_errors(prompt: object) -> None:
    with pytest.raises(TypeError, match="prompt must be"):
        Client(transport=Scripted([])).generate(prompt)  # type: ignore[arg-type]


def test_urls() -> None:
    assert split_url("127.0.0.1:9965") == ("http", "http://127.0.0.1:9965")
    assert split_url("grpc://h:1") == ("grpc", "h:1")
    with pytest.raises(ValueError, match="ftp"):
        split_url("ftp://h")


@pytest.fixture
def dying_server() -> Iterator[Callable[[list[int]], str]]:
    """HTTP servers that close the connection after as many lines as the script says."""
    servers: list[ThreadingHTTPServer] = []

    def start(script: list[int]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if body.get("text") == "bad":
                    return self.answer(400, {"error_msg": "text is bad", "error_code": 400})
                self.send_response(200)
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                first, count = body.get("send_idx", 0), script.pop(0) if script else len(TEXT)
                for index in range(first, min(first + count, len(TEXT))):
                    line = json.dumps(message(index)).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                if first + count >= len(TEXT):
                    self.wfile.write(b"0\r\n\r\n")
                self.close_connection = True
                return None

            def answer(self, status: int, value: Json) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_over_http_a_cut_connection_is_resumed(dying_server: Callable[[list[int]], str]) -> None:
    with Client(dying_server([1, 2])) as client:
        answer = client.generate("hi")
    assert (answer.text, answer.num_resumes) == ("Hello world", 2)


async def test_over_async_http_a_cut_connection_is_resumed(dying_server: Callable[[list[int]], str]) -> None:
    async with AsyncClient(dying_server([3])) as client:
        answer = await client.generate("hi")
    assert (answer.text, answer.num_resumes) == ("Hello world", 1)


def test_over_http_a_refusal_is_its_error(dying_server: Callable[[list[int]], str]) -> None:
    with Client(dying_server([])) as client, pytest.raises(InvalidRequest, match="text is bad"):
        client.generate("bad")


def test_an_unreachable_server_is_a_transport_loss_once_patience_ends() -> None:
    with Client("http://127.0.0.1:9", patience=0.0) as client, pytest.raises(TransportLost):
        client.generate("hi", options=Options(timeout=2))
