"""The response sink of the Triton model: no question about cancellation is on its way while the last message is sent,
and a stream ends even if its answer finds no room in shared memory.

Triton 2.51 frees what such a question looks at with the last message, and dies. Its sender takes nothing after a last
message that failed. `pb_utils` is a stand-in here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

MODEL = Path(__file__).resolve().parents[2] / "model_repository" / "model" / "1" / "model.py"


class Sender:
    """Notes what overlaps; a question takes until `answer` is set."""

    def __init__(self) -> None:
        self.asked, self.answer = threading.Event(), threading.Event()
        self.is_asking = False
        self.sent: list[tuple[int, bool]] = []  # flags, and whether a question was on its way
        self.responses: list[object] = []

    def send(self, response: object = None, flags: int = 0) -> None:
        self.sent.append((flags, self.is_asking))
        self.responses.append(response)

    def is_cancelled(self) -> bool:
        self.is_asking = True
        self.asked.set()
        assert self.answer.wait(10)
        self.is_asking = False
        return False


class Request:
    def __init__(self) -> None:
        self.sender = Sender()

    def get_response_sender(self) -> Sender:
        return self.sender


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """model.py with a stand-in for what Triton gives it."""
    stand_in = ModuleType("triton_python_backend_utils")
    stand_in.Tensor = lambda name, value: value  # type: ignore[attr-defined]
    stand_in.InferenceResponse = lambda output_tensors: output_tensors  # type: ignore[attr-defined]
    stand_in.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1  # type: ignore[attr-defined]
    stand_in.TritonModelException = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    spec = importlib.util.spec_from_file_location("model_under_test", MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_last_message_waits_for_a_question_and_others_do_not(model: Any) -> None:
    request = Request()
    sink = model.ResponseSink(request)
    asking = threading.Thread(target=sink.cancelled)
    asking.start()
    assert request.sender.asked.wait(10)
    sink.send(b"one", False)
    last = threading.Thread(target=sink.send, args=(b"two", True))
    last.start()
    last.join(0.1)
    assert last.is_alive()
    assert request.sender.sent == [(0, True)]
    request.sender.answer.set()
    last.join(10)
    asking.join(10)
    assert request.sender.sent == [(0, True), (1, False)]


def test_nothing_is_asked_or_sent_after_the_last_message(model: Any) -> None:
    request = Request()
    sink = model.ResponseSink(request)
    sink.send(b"all", True)
    assert sink.cancelled() is True
    assert not request.sender.asked.is_set()
    with pytest.raises(model.SinkClosed):
        sink.send(b"more", False)
    with pytest.raises(model.SinkClosed):
        sink.send(b"more", True)


def test_an_empty_last_message_ends_the_stream_without_a_response(model: Any) -> None:
    request = Request()
    sink = model.ResponseSink(request)
    sink.send(b"", True)
    assert (request.sender.sent, request.sender.responses) == ([(1, False)], [None])
    assert sink.cancelled() is True


class Full(Sender):
    """Shared memory has room for `room` bytes."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.closed = room, False

    def send(self, response: object = None, flags: int = 0) -> None:
        if self.closed:
            raise RuntimeError("response sender has been closed")
        self.closed = flags == 1
        if response is not None and len(response[0][0]) > self.room:  # type: ignore[index]
            raise RuntimeError("Failed to increase the shared memory pool size")
        super().send(response, flags)


@pytest.fixture
def full_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.os, "statvfs", lambda path: SimpleNamespace(f_bavail=10, f_frsize=4096))


@pytest.mark.parametrize("final", [False, True])
def test_an_answer_that_finds_no_room_is_an_error_at_once(model: Any, full_memory: None, final: bool) -> None:
    request = Request()
    request.sender = Full(room=500)
    sink = model.ResponseSink(request)
    sink.send(b"x" * 400, False)
    with pytest.raises(model.SinkClosed):
        sink.send(b"x" * 600, final)
    assert [flags for flags, _ in request.sender.sent] == [0, 1]
    last = json.loads(request.sender.responses[-1][0][0])
    assert last["error_code"] == 503
    assert "shared memory" in last["error_msg"]
    with pytest.raises(model.SinkClosed):
        sink.send(b"more", True)


def test_where_room_is_short_an_answer_that_fits_goes_ahead_of_the_end(model: Any, full_memory: None) -> None:
    request = Request()
    request.sender = Full(room=500)
    model.ResponseSink(request).send(b"x" * 400, True)
    assert [flags for flags, _ in request.sender.sent] == [0, 1]
    assert request.sender.responses[1] is None


def test_where_there_is_room_the_end_rides_on_the_last_message(model: Any) -> None:
    request = Request()
    model.ResponseSink(request).send(b"x" * 400, True)
    assert [flags for flags, _ in request.sender.sent] == [1]
