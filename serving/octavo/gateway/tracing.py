"""Traces of requests: the gateway's span, the model's span below it, and queue, prefill and decode below that.

Runs on the event loop of a gateway worker; the exporter has a thread of its own. All spans are made here, the inner
ones at a request's end from the times in its last message. Attributes are the gen_ai.* conventions'; no text of a
request or of an answer is among them. The only module that imports OpenTelemetry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import msgspec
from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo import __version__
from octavo.gateway.direct import Direct
from octavo.gateway.upstream import Batch, Event, Upstream
from octavo.protocol.errors import OctavoError
from octavo.settings import Settings

TRACED = ("/v1/chat/completions", "/v1/completions")  # and what is below them
W3C = TraceContextTextMapPropagator()
# fields of a request to the model that the conventions have a name for
REQUEST_FIELDS = {
    "max_dec_len": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "topp": "gen_ai.request.top_p",
    "top_p": "gen_ai.request.top_p",
    "top_k": "gen_ai.request.top_k",
    "frequency_score": "gen_ai.request.frequency_penalty",
    "presence_score": "gen_ai.request.presence_penalty",
    "n": "gen_ai.request.choice.count",
}


class Tracing:
    """One per worker: a tracer, the ASGI layer and the upstream around which it goes."""

    def __init__(self, exporter: SpanExporter, *, service: str, model: str) -> None:
        resource = Resource.create({"service.name": service, "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("octavo.gateway", __version__)
        self.model = model

    @classmethod
    def exporting(cls, settings: Settings) -> Tracing:
        """To the OTLP collector that the settings name, over HTTP."""
        assert settings.otlp_endpoint is not None
        exporter = OTLPSpanExporter(endpoint=f"{settings.otlp_endpoint.rstrip('/')}/v1/traces")
        return cls(exporter, service=settings.otel_service_name, model=settings.served_model_name)

    def around(self, upstream: Upstream) -> TracedUpstream:
        return TracedUpstream(upstream, self)

    def routes(self, app: ASGIApp) -> TracedRoutes:
        return TracedRoutes(app, tracing=self)

    def flush(self) -> None:
        """Send what has ended so far; blocks."""
        self._provider.force_flush()

    async def close(self) -> None:
        """Send what is left; does not block the loop."""
        await asyncio.to_thread(self._provider.shutdown)


class TracedRoutes:
    """The outermost ASGI layer: a server span for each generation request, under the caller's if it names one."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(TRACED):
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"][:128]}
        name = f"{scope['method']} {TRACED[0] if scope['path'].startswith(TRACED[0]) else TRACED[1]}"
        span = self._tracing.tracer.start_span(
            name, context=W3C.extract(headers), kind=SpanKind.SERVER, attributes=attributes
        )
        token = contexts.attach(trace.set_span_in_context(span))
        try:
            await self._app(scope, receive, _noting(send, span))
        finally:
            contexts.detach(token)
            span.end()


def _noting(send: Send, span: Span) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set_attribute("http.response.status_code", message["status"])
            if message["status"] >= 500:
                span.set_status(Status(StatusCode.ERROR))
        await send(message)

    return noting


class TracedUpstream(Upstream):
    """An `Upstream` whose requests are traced: all that is done is done by the one inside."""

    def __init__(self, upstream: Upstream, tracing: Tracing) -> None:  # nothing of the base is set up
        self._upstream = upstream
        self._tracing = tracing

    async def start(self) -> None:
        await self._upstream.start()

    async def ask(self, op: Mapping[str, object], *, timeout: float = 5.0) -> dict[str, object]:
        return await self._upstream.ask(op, timeout=timeout)

    async def close(self) -> None:
        await self._upstream.close()
        await self._tracing.close()

    async def generate(
        self, request: Mapping[str, object], *, timeout: float, direct: Direct | None = None
    ) -> AsyncGenerator[Batch, None]:
        """As `Upstream.generate`, but nothing goes `direct`: the span sees every message. The model is asked for times;
        they are taken out again if the client did not ask.
        """
        wants_times = request.get("benchmark") is True
        span = ModelSpan(self._tracing, request)
        try:
            batches = self._upstream.generate({**request, **span.carried(), "benchmark": True}, timeout=timeout)
            async with aclosing(batches):
                async for batch in batches:
                    span.note(batch)
                    if not wants_times:
                        batch[:] = map(_without_times, batch)
                    yield batch
        except OctavoError as error:
            span.fail(error)
            raise
        finally:
            span.end()


def _without_times(event: Event) -> Event:
    message, raw = event
    if raw is None or message.times is None:  # a message without its JSON has nothing but tokens
        return event
    fields = msgspec.json.decode(raw)
    fields.pop("times", None)
    return message, msgspec.json.encode(fields)


class ModelSpan:
    """The span of one request to the model, and those of its stages."""

    def __init__(self, tracing: Tracing, request: Mapping[str, object]) -> None:
        self._tracer = tracing.tracer
        self._operation = "chat" if not request.get("raw_text") and "input_ids" not in request else "text_completion"
        self._span = self._tracer.start_span(
            f"{self._operation} {tracing.model}",
            kind=SpanKind.CLIENT,
            attributes=_asked(request, self._operation, tracing.model),
        )
        self._start = time.time_ns()
        self._began = False
        self._reasons: list[str] = []
        self._prompt_tokens = self._output_tokens = 0
        self._times: dict[str, float] | None = None
        self._last = self._start

    def carried(self) -> dict[str, object]:
        """What goes to the model with the request: this span's id in W3C's form."""
        carrier: dict[str, object] = {}
        W3C.inject(carrier, context=trace.set_span_in_context(self._span))  # type: ignore[arg-type]
        return {name: carrier[name] for name in ("traceparent",) if name in carrier}

    def note(self, batch: Batch) -> None:
        self._last = time.time_ns()
        if not self._began:
            self._began = True
            self._span.add_event("gen_ai.first_token", timestamp=self._last)
        for message, raw in batch:
            if raw is not None and message.is_end:
                self._reasons.append(message.finish_reason or "")
                self._times = message.times or self._times
                if message.usage is not None:
                    self._prompt_tokens = message.usage.prompt_tokens
                    self._output_tokens += message.usage.completion_tokens

    def fail(self, error: OctavoError) -> None:
        self._span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        self._span.set_attribute("error.type", str(error.status))

    def end(self) -> None:
        if self._reasons:
            self._span.set_attribute("gen_ai.response.finish_reasons", self._reasons)
            self._span.set_attribute("gen_ai.usage.input_tokens", self._prompt_tokens)
            self._span.set_attribute("gen_ai.usage.output_tokens", self._output_tokens)
        if self._times is not None:
            self._stages(self._times)
        self._span.end()

    def _stages(self, times: Mapping[str, float]) -> None:
        """queue, prefill and decode: the front end's clock is put so that its end is when the last message came."""
        begin = max(self._start, self._last - int(times.get("e2e_s", 0.0) * 1e9))
        scheduled = min(begin + int(times.get("queue_s", 0.0) * 1e9), self._last)
        first = min(max(scheduled, begin + int(times.get("ttft_s", 0.0) * 1e9)), self._last)
        parent = trace.set_span_in_context(self._span)
        for name, start, end in (
            ("queue", begin, scheduled),
            ("prefill", scheduled, first),
            ("decode", first, self._last),
        ):
            self._tracer.start_span(name, context=parent, start_time=start).end(end)


def _asked(request: Mapping[str, object], operation: str, model: str) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "octavo",
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": str(request.get("req_id", "")),
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelStreamInfer",
    }
    for name, attribute in REQUEST_FIELDS.items():
        value = request.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            attributes[attribute] = value
    return attributes
