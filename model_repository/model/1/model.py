"""Triton's view of Octavo: hands bodies from the tensor IN to the front end and sends what comes back to OUT.

Runs in Triton's Python-backend stub; the only importer of triton_python_backend_utils. `execute` returns at once: the
model is decoupled, answers are sent by the front end's threads. Knows nothing of requests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import select
import sys
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

if importlib.util.find_spec("octavo") is None:  # bare Triton on a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "serving"))

from octavo.frontend.frontend import FrontEnd
from octavo.frontend.sink import SinkClosed
from octavo.protocol.answers import encode_error
from octavo.protocol.errors import InvalidRequest, Unavailable
from octavo.settings import Settings

log = logging.getLogger("octavo.model")

SHARED_MEMORY = "/dev/shm"
ROOM_BYTES = 2 << 20  # it grows by 1 MiB at least
_NO_ROOM = encode_error(Unavailable("the answer could not be sent: the server's shared memory is full"), None)


class ResponseSink:
    """Sends to one gRPC stream through Triton's response sender.

    The sender is let go with the last message: Triton cannot unload the model, nor end, while one is alive. Triton
    frees what a question about cancellation looks at once the last message is there, and dies of one that is still
    on its way (a segmentation fault in ResponseFactoryIsCancelled); so those two exclude each other.

    A message that finds no room in shared memory fails, and a last message that fails leaves the client waiting for
    ever: the sender takes nothing after it. So where room is short the answer goes ahead of an empty last message, and
    if it does not fit, the last message says so.
    """

    def __init__(self, request: object) -> None:
        self._sender = request.get_response_sender()
        self._asking = threading.Lock()  # held during a question about cancellation and during the last message

    def send(self, payload: bytes, final: bool) -> None:
        """Send one message. An empty one with `final` ends the stream without a word."""
        try:
            if final and (not payload or _has_room(len(payload))):
                self._end(payload)
            else:
                self._send(payload, 0)
                if final:
                    self._end(b"")
        except pb_utils.TritonModelException as error:
            self._break_off(len(payload), error)
            raise SinkClosed(str(error)) from None

    def _send(self, payload: bytes, flags: int) -> None:
        if self._sender is None:
            raise SinkClosed("the last message was sent")
        if payload:
            tensor = pb_utils.Tensor("OUT", np.array([payload], dtype=np.object_))
            self._sender.send(pb_utils.InferenceResponse(output_tensors=[tensor]), flags=flags)
        else:
            self._sender.send(flags=flags)

    def _end(self, payload: bytes) -> None:
        with self._asking:
            try:
                self._send(payload, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            finally:
                self._sender = None

    def _break_off(self, num_bytes: int, error: Exception) -> None:
        """Whoever waits for what could not be sent hears of it."""
        if self._sender is None:
            return
        log.error("a message of %d bytes could not be sent: %s", num_bytes, error)
        with contextlib.suppress(pb_utils.TritonModelException):
            self._end(_NO_ROOM)

    def cancelled(self) -> bool:
        if not self._asking.acquire(blocking=False):
            return False  # the last message is being sent
        sender = self._sender
        try:
            return sender is None or bool(sender.is_cancelled())
        except pb_utils.TritonModelException:
            return True
        finally:
            self._asking.release()


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = Settings.from_environ()
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        parent = os.pidfd_open(os.getppid())
        threading.Thread(target=_end_with, args=(parent,), name="octavo-parent", daemon=True).start()
        self._frontend = FrontEnd(settings)

    def execute(self, requests: list[object]) -> None:
        for request in requests:
            sink = ResponseSink(request)
            self._frontend.submit(_body(request), request.request_id() or "", sink)

    def finalize(self) -> None:
        self._frontend.finalize()


def _has_room(num_bytes: int) -> bool:
    """Whether Triton's shared memory can grow by a message of so many bytes, whatever is free inside it."""
    free = os.statvfs(SHARED_MEMORY)
    return free.f_bavail * free.f_frsize >= num_bytes + ROOM_BYTES


def _body(request: object) -> bytes:
    """The one string in IN; what is no single string becomes a body that is refused."""
    try:
        values = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy().reshape(-1)
        if len(values) != 1 or not isinstance(values[0], bytes):
            raise InvalidRequest("IN must hold one string")
        return values[0]
    except (AttributeError, InvalidRequest):
        return b"IN must hold one string"


def _end_with(parent: int) -> None:
    """Wait for Triton to die, then end at once: an orphan stub would hold memory and its engine.

    A killed Triton cannot remove the shared memory that it made for this stub, whose name is one of our arguments.
    """
    poller = select.poll()
    poller.register(parent, select.POLLIN)
    while not poller.poll(1000):
        pass
    for argument in Path("/proc/self/cmdline").read_text().split("\0"):
        if argument.startswith("octavo_") and "/" not in argument:
            Path(SHARED_MEMORY, argument).unlink(missing_ok=True)
    os._exit(1)
