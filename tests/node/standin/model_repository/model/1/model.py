"""A stand-in for the front end: answers the ops that node uses and streams letters. No engine behind it.

One thread per generation: `max_dec_len` letters, one every STANDIN_STEP seconds (0.02). "ready" comes
STANDIN_LOAD_SECONDS after the start. Runs in Triton's stub process; ends with its parent.
"""

from __future__ import annotations

import json
import os
import select
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


def end_with_parent() -> None:
    parent = os.pidfd_open(os.getppid())
    select.select([parent], [], [])
    os._exit(1)


class TritonPythonModel:
    def initialize(self, args: dict) -> None:
        self.started = time.monotonic()
        self.load_seconds = float(os.environ.get("STANDIN_LOAD_SECONDS", "0"))
        self.step = float(os.environ.get("STANDIN_STEP", "0.02"))
        self.running = 0
        self.accepted = 0
        self.draining = False
        self.lock = threading.Lock()
        threading.Thread(target=end_with_parent, daemon=True).start()
        if os.environ.get("STANDIN_FAIL") == "1":
            raise RuntimeError("the stand-in was told to fail")

    def execute(self, requests: list) -> None:
        for request in requests:
            body = json.loads(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            body = body[0] if isinstance(body, list) else body
            sender = request.get_response_sender()
            if "op" in body:
                self.send(sender, self.answer(body["op"]), final=True)
            elif self.draining:
                self.send(sender, {"error_msg": "draining", "error_code": 503}, final=True)
            else:
                self.running += 1
                self.accepted += 1
                threading.Thread(target=self.generate, args=(sender, body), daemon=True).start()

    def answer(self, op: str) -> dict:
        if op == "drain":
            self.draining = True
            return {"draining": True}
        if op == "metrics":
            return {"text": f"# TYPE octavo_requests_total counter\noctavo_requests_total {self.accepted}\n"}
        age = time.monotonic() - self.started
        fraction = min(1.0, age / self.load_seconds) if self.load_seconds else 1.0
        state = "draining" if self.draining else "ready" if fraction >= 1 else "loading"
        return {
            "state": state,
            "reason": "",
            "progress": {"stage": "weights", "fraction": fraction},
            "model": None,
            "engine": None,
            "engine_age": 0.0,
            "limits": {},
            "frontend": {
                "pid": os.getpid(),
                "running": self.running,
                "waiting": 0,
                "accepted": self.accepted,
                "epoch": 1,
            },
        }

    def generate(self, sender, body: dict) -> None:
        count = int(body.get("max_dec_len", 4))
        for index in range(count):
            time.sleep(self.step)
            last = index == count - 1
            message = {
                "req_id": body.get("req_id"),
                "token": "a",
                "token_ids": [97],
                "send_idx": index,
                "is_end": int(last),
            }
            if last:
                with self.lock:
                    self.running -= 1
            self.send(sender, [message], final=last)

    def send(self, sender, message: object, *, final: bool) -> None:
        tensor = pb_utils.Tensor("OUT", np.array([json.dumps(message).encode()], dtype=np.object_))
        sender.send(pb_utils.InferenceResponse([tensor]), flags=FINAL if final else 0)
