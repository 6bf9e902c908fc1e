"""The response sink of the Triton model: no question about cancellation is on its way while the last message is sent.

Triton 2.51 frees what such a question looks at with the last message, and dies. `pb_utils` is a stand-in here.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType
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
