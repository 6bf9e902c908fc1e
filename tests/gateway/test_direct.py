"""The short way of tokens from the carrier to the connection: the same bytes, and a way around when it is closed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import requests

from gateway.conftest import Stack
from octavo.gateway import native_routes
from octavo.gateway.http_protocol import CycleWriter

WORDS = [f" word{number}" for number in range(20)]
NATIVE = {"text": "hi", "stream": True, "req_id": "r1", "infer_seed": 5}
OPENAI = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "seed": 5}


def post(stack: Stack, body: dict[str, Any]) -> str:
    stack.fake.words = list(WORDS)
    stack.fake.delay = 0.005  # so that the handler waits for each message
    answer = requests.post(f"{stack.url}/v1/chat/completions", json=body, timeout=10)
    assert answer.status_code == 200
    return answer.text


def same_but_for_ids(text: str) -> str:
    """OpenAI's chunks carry an id and a time of their own."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if "{" in line]
    return json.dumps([{**json.loads(line), "id": "", "created": 0} for line in lines])


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The pieces that go the short way."""
    pieces: list[bytes] = []
    write = CycleWriter.write

    def noting(self: CycleWriter, piece: bytes) -> None:
        pieces.append(piece)
        write(self, piece)

    monkeypatch.setattr(CycleWriter, "write", noting)
    return pieces


def close_short_way(monkeypatch: pytest.MonkeyPatch, *, after: Callable[[CycleWriter], bool]) -> None:
    is_open = CycleWriter.writable.fget
    assert is_open is not None
    monkeypatch.setattr(CycleWriter, "writable", property(lambda self: is_open(self) and not after(self)))


@pytest.mark.parametrize("body", [NATIVE, OPENAI], ids=["native", "openai"])
def test_most_tokens_go_the_short_way_and_say_the_same(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, written: list[bytes], body: dict[str, Any]
) -> None:
    short = post(stack, body)
    assert len(written) > len(WORDS) // 2
    close_short_way(monkeypatch, after=lambda _: True)
    del written[:]
    assert same_but_for_ids(post(stack, body)) == same_but_for_ids(short)
    assert not written


def test_a_connection_that_is_full_gets_the_rest_from_its_handler(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, written: list[bytes]
) -> None:
    close_short_way(monkeypatch, after=lambda writer: writer.num_bytes > 300)
    said = [json.loads(line) for line in post(stack, NATIVE).splitlines()]
    assert [one["token"] for one in said] == WORDS
    assert 0 < len(written) < len(WORDS) // 2


def test_what_cannot_be_rendered_ends_its_own_stream_only(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    render = native_routes._lines_of

    def broken(batch: Any) -> bytes:
        if any(message.send_idx == 9 for message, _ in batch):
            raise ZeroDivisionError
        return render(batch)

    monkeypatch.setattr(native_routes, "_lines_of", broken)
    last = json.loads(post(stack, NATIVE).splitlines()[-1])
    assert (last["error_code"], last["is_end"]) == (500, 1)
    monkeypatch.setattr(native_routes, "_lines_of", render)
    assert len(post(stack, NATIVE).splitlines()) == len(WORDS)
