"""A stand-in for the module that Triton's stub brings: as much of it as model.py uses. Requests are made by tests."""

from __future__ import annotations

import queue

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name = name
        self._array = array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor]) -> None:
        self.output_tensors = output_tensors


class ResponseSender:
    """Keeps what was sent as (payload, final)."""

    def __init__(self) -> None:
        self.sent: queue.Queue[tuple[bytes, bool]] = queue.Queue()
        self.is_gone = False
        self.closed = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        if self.closed:
            raise TritonModelException("the response sender is closed")
        self.closed = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        (tensor,) = response.output_tensors
        assert tensor.name() == "OUT"
        assert tensor.as_numpy().shape == (1,)
        self.sent.put((tensor.as_numpy()[0], self.closed))

    def is_cancelled(self) -> bool:
        return self.is_gone


class InferenceRequest:
    def __init__(self, body: bytes, request_id: str = "") -> None:
        self._tensors = {"IN": Tensor("IN", np.array([body], dtype=np.object_))}
        self._request_id = request_id
        self.sender = ResponseSender()

    def request_id(self) -> str:
        return self._request_id

    def get_response_sender(self) -> ResponseSender:
        return self.sender


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return request._tensors.get(name)
