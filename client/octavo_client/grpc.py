"""Transports over Triton's gRPC: one ModelStreamInfer stream per request, IN and OUT as JSON.

Raw gRPC has no keys and no size limits: it is for networks one trusts.
"""

from __future__ import annotations

import collections
import queue
import struct
from collections.abc import AsyncGenerator, Iterator

import grpc
import msgspec
from tritonclient.grpc import service_pb2, service_pb2_grpc

from octavo.protocol.errors import InternalError, from_native
from octavo_client.transport import JsonObject, TransportLost

MODEL = "model"
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.use_local_subchannel_pool", 1),
]
MARGIN_SECONDS = 5.0
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)


def infer_request(payload: JsonObject) -> service_pb2.ModelInferRequest:
    """IN: a list of one object, as one BYTES element."""
    body = msgspec.json.encode([payload])
    request = service_pb2.ModelInferRequest(model_name=MODEL, id=str(payload.get("req_id", "")))
    tensor = request.inputs.add(name="IN", datatype="BYTES", shape=[1])
    assert tensor is not None
    request.outputs.add(name="OUT")
    request.raw_input_contents.append(struct.pack("<I", len(body)) + body)
    return request


def message_of(response: service_pb2.ModelStreamInferResponse) -> JsonObject | None:
    """The object in OUT, an error object too; None for an empty response. Raises InternalError, TransportLost."""
    if response.error_message:
        raise TransportLost(response.error_message)
    contents = response.infer_response.raw_output_contents
    if not contents:
        return None
    value = msgspec.json.decode(contents[0][4:])
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, dict):
        raise InternalError("the server sent a message that is not an object")
    return value


def _is_last(message: JsonObject, payload: JsonObject) -> bool:
    """Behind such a message the stream is left to end by itself before the message is given out.

    A stream that is cancelled right behind its last message can leave Triton with a request that it never lets go.
    """
    return bool(message.get("is_end") or message.get("error_code") or "op" in payload)


def _answer(messages: list[JsonObject]) -> JsonObject:
    """The one message of an op. Raises OctavoError, TransportLost."""
    if not messages:
        raise TransportLost("the stream ended without an answer")
    if messages[0].get("error_code"):
        raise from_native(messages[0])
    return messages[0]


def _lost(error: grpc.RpcError) -> Exception:
    code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
    if code in LOST or code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TransportLost(f"{code.name.lower()}: {error.details() if isinstance(error, grpc.Call) else error}")
    return InternalError(f"gRPC {code.name.lower()}")


class GrpcTransport:
    """Blocking; one channel."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def stream(self, payload: JsonObject, *, timeout: float) -> Iterator[JsonObject]:
        # The request side stays open until the answer is whole: Triton takes a half-closed stream as it is, but a
        # cancel must be able to reach it.
        requests: queue.SimpleQueue[service_pb2.ModelInferRequest | None] = queue.SimpleQueue()
        requests.put(infer_request(payload))
        call = self._stub.ModelStreamInfer(iter(requests.get, None), timeout=timeout + MARGIN_SECONDS)
        try:
            for response in call:
                message = message_of(response)
                if message is None:
                    continue
                if _is_last(message, payload):
                    requests.put(None)
                    collections.deque(call, maxlen=0)
                yield message
        except grpc.RpcError as error:
            raise _lost(error) from error
        finally:
            requests.put(None)
            call.cancel()

    def call(self, payload: JsonObject, *, timeout: float) -> JsonObject:
        return _answer(list(self.stream(payload, timeout=timeout)))

    def close(self) -> None:
        self._channel.close()


class AsyncGrpcTransport:
    """For one event loop; one channel, opened by the first call."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel: grpc.aio.Channel | None = None

    def _stub(self) -> service_pb2_grpc.GRPCInferenceServiceStub:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS)
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def stream(self, payload: JsonObject, *, timeout: float) -> AsyncGenerator[JsonObject, None]:
        call = self._stub().ModelStreamInfer(timeout=timeout + MARGIN_SECONDS)
        try:
            await call.write(infer_request(payload))
            while (response := await call.read()) is not grpc.aio.EOF:
                message = message_of(response)
                if message is None:
                    continue
                if _is_last(message, payload):
                    await call.done_writing()
                    while await call.read() is not grpc.aio.EOF:
                        pass
                yield message
        except grpc.RpcError as error:
            raise _lost(error) from error
        finally:
            call.cancel()

    async def call(self, payload: JsonObject, *, timeout: float) -> JsonObject:
        return _answer([message async for message in self.stream(payload, timeout=timeout)])

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()
