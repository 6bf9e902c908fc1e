"""Triton's ModelStreamInfer as this gateway uses it: one input IN, one output OUT, one JSON text each.

Stateless helpers for the event loop of a gateway worker. Knows the protobuf messages and what a gRPC failure means
here; knows nothing of HTTP or of the JSON inside.
"""

from __future__ import annotations

import struct

import grpc
from tritonclient.grpc import service_pb2

from octavo.protocol.errors import InternalError, OctavoError, RequestTimeout

METHOD = "/inference.GRPCInferenceService/ModelStreamInfer"
MODEL = "model"
_LENGTH = struct.Struct("<I")  # BYTES elements carry their length in four bytes, little-endian


class Lost(Exception):
    """The stream broke or never came about: the server may be restarting.

    `refused` is true if nobody works on this request; `reached` if it may have been accepted before.
    """

    def __init__(self, reason: str, *, refused: bool, reached: bool | None = None) -> None:
        super().__init__(reason)
        self.refused = refused
        self.reached = not refused if reached is None else reached


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """Options of the one channel to Triton on loopback.

    No keepalive pings: a dead process closes its socket at once on loopback, and Triton answers pings on quiet
    streams with "too many pings" and closes the connection. The back-off is short because a restarted Triton is back
    within seconds. A fixed 64 KiB window per stream bounds what a slow reader can make this process hold.
    """
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]


def infer_request(payload: bytes, triton_id: str) -> service_pb2.ModelInferRequest:
    """A request whose IN is the one text `payload`."""
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="IN", datatype="BYTES", shape=[1])
    return service_pb2.ModelInferRequest(
        model_name=MODEL, id=triton_id, inputs=[tensor], raw_input_contents=[_LENGTH.pack(len(payload)) + payload]
    )


def payload_of(response: service_pb2.ModelStreamInferResponse) -> bytes:
    """The text in OUT, b"" for a response without one. Raises Lost if Triton itself reports an error."""
    if response.error_message:
        # The model answers errors as messages of its own: one from Triton is about a model that is gone or not there.
        raise Lost(response.error_message, refused=True, reached=True)
    contents = response.infer_response.raw_output_contents
    return contents[0][4:] if contents else b""


def failure_of(error: grpc.aio.AioRpcError) -> Lost | OctavoError:
    """What a failed RPC means for its request."""
    code, details = error.code(), error.details() or ""
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return RequestTimeout("the request's time is over")
    if code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED):
        return InternalError(f"the model server refused the message: {code.name.lower()}")
    return Lost(f"{code.name.lower()}: {details}", refused="failed to connect" in details)
