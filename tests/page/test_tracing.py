"""Traces: which spans a request makes, under whom, with what; and that nothing else changes."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
import uvicorn
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from gateway.conftest import Stack, until
from octavo.gateway.app import create_app
from octavo.gateway.telemetry import tracing_of
from octavo.gateway.tracing import Tracing
from octavo.gateway.upstream import Upstream
from octavo.settings import Settings

CHAT = "/v1/chat/completions"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
TIMES = {"queue_s": 0.01, "ttft_s": 0.03, "itl_s": 0.002, "e2e_s": 0.05}


class Traced:
    """A gateway with traces in memory, in front of the stack's stand-in for Triton."""

    def __init__(self, stack: Stack) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(self.exporter, service="octavo", model="tiny")
        self.stack = stack
        self.fake = stack.fake
        stack.run(self._start())

    async def _start(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        upstream = Upstream(f"127.0.0.1:{self.fake.port}", max_message_bytes=64 << 20, clock=time.monotonic)
        app = create_app(self.stack.settings, upstream, tracing=self.tracing)
        self.server = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="on", log_config=None))
        self._serving = asyncio.ensure_future(self.server._serve([listener]))
        while not self.server.started:
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        self.server.should_exit = True
        await self._serving

    def close(self) -> None:
        self.stack.run(self._stop())

    def ask(self, body: dict, path: str = CHAT, **headers: str) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=headers, timeout=10)

    def spans(self, count: int) -> dict[str, ReadableSpan]:
        """All spans once `count` are there, by name."""

        def enough() -> bool:
            self.tracing.flush()
            return len(self.exporter.get_finished_spans()) >= count

        until(enough)
        found = {span.name: span for span in self.exporter.get_finished_spans()}
        assert len(found) == count
        return found


@pytest.fixture
def traced(stack: Stack) -> Iterator[Traced]:
    stack.fake.times = dict(TIMES)
    one = Traced(stack)
    yield one
    one.close()


@pytest.mark.parametrize("body", [{"text": "hi"}, {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_tree_of_five_spans(traced: Traced, body: dict, stream: bool) -> None:
    assert traced.ask({**body, "stream": stream}, traceparent=TRACEPARENT).status_code == 200
    spans = traced.spans(5)
    server, model = spans[f"POST {CHAT}"], spans["chat tiny"]
    assert f"{server.context.trace_id:032x}" == TRACE
    assert f"{server.parent.span_id:016x}" == PARENT
    assert model.parent.span_id == server.context.span_id
    stages = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(one.parent.span_id == model.context.span_id for one in stages)
    assert {one.context.trace_id for one in spans.values()} == {server.context.trace_id}
    edges = [model.start_time, *(time for one in stages for time in (one.start_time, one.end_time)), model.end_time]
    assert edges == sorted(edges)
    assert server.start_time <= model.start_time
    assert server.attributes["http.response.status_code"] == 200


def test_the_stages_last_as_long_as_the_model_says(traced: Traced) -> None:
    traced.fake.first_delay = 0.1  # so that the stages lie inside of the model's span
    traced.ask({"text": "hi"})
    spans = traced.spans(5)
    seconds = {name: (span.end_time - span.start_time) / 1e9 for name, span in spans.items()}
    assert seconds["queue"] == pytest.approx(0.01, abs=1e-4)
    assert seconds["prefill"] == pytest.approx(0.02, abs=1e-4)
    assert seconds["decode"] == pytest.approx(0.02, abs=1e-4)


def test_the_models_span_has_the_conventions_attributes_and_no_text(traced: Traced) -> None:
    answer = traced.ask({"text": "a secret", "temperature": 0.5, "topp": 0.9, "max_dec_len": 4, "req_id": "r1"})
    attributes = dict(traced.spans(5)["chat tiny"].attributes)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.id": "r1",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 4,
    }
    assert {name: attributes[name] for name in expected} == expected
    told = json.dumps([dict(span.attributes) for span in traced.exporter.get_finished_spans()], default=str)
    assert "secret" not in told
    assert answer.json()["tokens_all"] not in told


def test_an_error_is_marked(traced: Traced) -> None:
    traced.fake.error = {"error_msg": "the queue is full", "error_code": 429}
    assert traced.ask({"text": "hi"}).status_code == 429
    spans = traced.spans(2)
    assert spans["chat tiny"].status.status_code is StatusCode.ERROR
    assert spans["chat tiny"].attributes["error.type"] == "429"
    assert spans[f"POST {CHAT}"].attributes["http.response.status_code"] == 429


def test_the_wire_carries_the_models_span(traced: Traced) -> None:
    traced.ask({"text": "hi"}, traceparent=TRACEPARENT)
    model = traced.spans(5)["chat tiny"]
    sent = traced.fake.requests[-1]["traceparent"]
    assert sent == f"00-{TRACE}-{model.context.span_id:016x}-01"


def test_a_caller_that_does_not_sample_is_not_sampled(traced: Traced) -> None:
    traced.ask({"text": "hi"}, traceparent=TRACEPARENT[:-2] + "00")
    traced.ask({"text": "hi"})
    assert len({span.context.trace_id for span in traced.spans(5).values()}) == 1


@pytest.mark.parametrize("wrong", ["", "00-zz", f"00-{'0' * 32}-{PARENT}-01", "x" * 5000])
def test_a_broken_traceparent_is_as_none(traced: Traced, wrong: str) -> None:
    assert traced.ask({"text": "hi"}, traceparent=wrong).status_code == 200
    assert traced.spans(5)[f"POST {CHAT}"].parent is None


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_the_same_with_traces_and_without(traced: Traced, stream: bool) -> None:
    body = {"text": "hi", "req_id": "same", "infer_seed": 7, "stream": stream}
    with_traces = traced.ask(body).content
    without = requests.post(traced.stack.url + CHAT, json=body, timeout=10).content
    assert with_traces == without
    assert b'"times"' not in with_traces
    assert b'"times"' in traced.ask({**body, "benchmark": True}).content


def test_probes_and_pages_are_not_traced(traced: Traced) -> None:
    for path in ("/health", "/", "/v1/models"):
        requests.get(traced.url + path, timeout=5)
    traced.tracing.flush()
    assert traced.exporter.get_finished_spans() == ()


class Collector(BaseHTTPRequestHandler):
    """Keeps what is posted to /v1/traces."""

    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces":
            self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_spans_reach_a_collector_over_otlp(stack: Stack) -> None:
    handler = type("Handler", (Collector,), {"received": []})
    collector = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}/", "OTEL_SERVICE_NAME": "mine"}
    tracing = tracing_of(Settings.from_environ({"SERVED_MODEL_NAME": "tiny", **environ}))
    assert tracing is not None
    tracing.tracer.start_span("one").end()
    asyncio.run(tracing.close())
    collector.shutdown()
    (batch,) = handler.received[0].resource_spans
    assert [span.name for span in batch.scope_spans[0].spans] == ["one"]
    assert {"mine"} <= {one.value.string_value for one in batch.resource.attributes if one.key == "service.name"}


def test_without_the_packages_it_is_said_and_the_server_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "octavo.gateway.tracing", None)
    settings = Settings.from_environ({"SERVED_MODEL_NAME": "x", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})
    with caplog.at_level("WARNING"):
        assert tracing_of(settings) is None
    assert "octavo[otel]" in caplog.text


def test_nothing_of_it_is_imported_where_it_is_off() -> None:
    script = "import sys\nfrom octavo.gateway.__main__ import make_config\nfrom octavo.settings import Settings\n"
    script += "make_config(Settings.from_environ({'SERVED_MODEL_NAME': 'x'}))\n"
    script += "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"
