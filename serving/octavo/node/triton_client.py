"""Operations on the model through Triton's gRPC: info, metrics, drain and one token.

Node's event loop; no state but a channel.
"""

from __future__ import annotations

import json
import struct

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2, service_pb2_grpc

from octavo.protocol.errors import OctavoError, Unavailable, from_native

MODEL = "model"
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),  # the peer is on this machine, whatever http_proxy says
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.max_receive_message_length", 64 << 20),
)


class TritonClient:
    """One channel to Triton. Every call has a deadline and raises OctavoError."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def ask(self, body: dict[str, object], *, seconds: float) -> dict[str, object]:
        """Send one request object and return its first answer.

        Raises OctavoError; Unavailable if Triton does not answer. The stream ends by itself: one that is cancelled
        right behind its last message can leave Triton with a request that it never lets go, and then it cannot stop.
        """
        call = self._stub.ModelStreamInfer(iter([encode(body)]), timeout=seconds)
        try:
            responses = [response async for response in call]
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"Triton: {error.code().name.lower().replace('_', ' ')}") from None
        finally:
            call.cancel()
        if not responses:
            raise Unavailable("Triton: the stream ended without an answer")
        return decode(responses[0])

    async def close(self) -> None:
        await self._channel.close()


def encode(body: dict[str, object]) -> service_pb2.ModelInferRequest:
    """IN: one string of JSON; a string tensor's bytes are a little-endian length and the text."""
    text = json.dumps(body).encode()
    request = service_pb2.ModelInferRequest(model_name=MODEL, id=str(body.get("req_id", "")))
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = "IN", "BYTES"
    tensor.shape.append(1)
    request.raw_input_contents.append(struct.pack("<I", len(text)) + text)
    return request


def decode(response: service_pb2.ModelStreamInferResponse) -> dict[str, object]:
    """OUT: a bare object or a list of one.

    Raises OctavoError for an error object, Unavailable if Triton itself failed.
    """
    if response.error_message:
        raise Unavailable(f"Triton: {response.error_message}")
    contents = response.infer_response.raw_output_contents
    if not contents:
        raise Unavailable("Triton: an empty answer")
    value = json.loads(contents[0][4:])
    body = value[0] if isinstance(value, list) else value
    if body.get("error_msg"):
        raise from_native(body)
    return dict(body)


__all__ = ["OctavoError", "TritonClient", "decode", "encode"]
