"""The memory of one stream: what was asked, what has come, what to ask after a loss. No I/O: both clients drive it."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable

from octavo.protocol.errors import Conflict, OctavoError, RequestTimeout, Unavailable, from_native
from octavo_client.options import Options, Prompt, prompt_payload
from octavo_client.results import Delta, Generation, parse_usage
from octavo_client.transport import JsonObject, TransportLost

FIRST_DELAY = 0.1  # seconds before the first retry; doubles up to MAX_DELAY
MAX_DELAY = 2.0


class StreamState:
    """Builds the request (again), takes messages in, decides about retries."""

    def __init__(
        self, prompt: Prompt, options: Options, *, req_id: str | None, clock: Callable[[], float], patience: float
    ) -> None:
        seed = options.infer_seed if options.infer_seed is not None else secrets.randbits(63)
        self.result = Generation(req_id or uuid.uuid4().hex, seed=seed)
        self._base: JsonObject = {**prompt_payload(prompt), **options.payload()}
        self._clock = clock
        self._deadline = clock() + options.timeout
        self._patience = patience
        self._attempt = 0
        self._next_idx = 0
        self._fingerprint: object = None
        self._lost_since: float | None = None
        self._delay = FIRST_DELAY
        self.done = False

    @property
    def remaining(self) -> float:
        """Seconds left of the caller's timeout."""
        return self._deadline - self._clock()

    def request(self) -> JsonObject:
        """The body of the next attempt. Raises RequestTimeout when there is no time left."""
        if self.remaining <= 0:
            raise RequestTimeout("timeout: no time was left", field="timeout")
        body = {
            **self._base,
            "req_id": self.result.req_id,
            "infer_seed": self.result.seed,
            "stream": True,
            "timeout": max(1, round(self.remaining)),
        }
        if self._attempt:
            body["attempt"] = self._attempt
        if self._next_idx:
            body |= {"generated_token_ids": list(self.result.token_ids), "send_idx": self._next_idx}
            if self._fingerprint is not None:
                body["fingerprint"] = self._fingerprint
        return body

    def feed(self, message: JsonObject) -> Delta | None:
        """Take one message in; None for one that was already seen. Raises OctavoError for an error message."""
        if message.get("error_msg") or message.get("error_code"):
            raise from_native(message)
        send_idx = message["send_idx"]
        assert isinstance(send_idx, int)
        if send_idx < self._next_idx:
            return None
        if send_idx > self._next_idx:
            raise TransportLost(f"message {self._next_idx} is missing, got {send_idx}")
        delta = self._take(message, send_idx)
        self._next_idx += 1
        self._lost_since, self._delay = None, FIRST_DELAY
        return delta

    def _take(self, message: JsonObject, send_idx: int) -> Delta:
        result = self.result
        text, token_ids = str(message.get("token", "")), message.get("token_ids") or []
        logprobs = message.get("logprobs")
        assert isinstance(token_ids, list)
        finish = str(message["finish_reason"]) if message.get("is_end") else None
        delta = Delta(
            text,
            tuple(token_ids),
            send_idx,
            finish,
            parse_usage(message.get("usage")),
            logprobs if isinstance(logprobs, list) else None,
        )
        result.text += text
        result.token_ids += token_ids
        result.logprobs += delta.logprobs or ()
        self._fingerprint = message.get("fingerprint", self._fingerprint)
        if finish is not None:
            result.finish_reason, result.usage, self.done = finish, delta.usage, True
        return delta

    def lost(self, error: TransportLost | OctavoError) -> float:
        """Seconds to wait before the next attempt. Raises `error` when another one makes no sense."""
        own_ghost = isinstance(error, Conflict) and self._attempt > 0  # the server has not noticed our loss yet
        if isinstance(error, OctavoError) and not isinstance(error, Unavailable) and not own_ghost:
            raise error
        now = self._clock()
        self._lost_since = now if self._lost_since is None else self._lost_since
        if now - self._lost_since > self._patience or self.remaining <= 0:
            raise error
        self._attempt += 1
        self.result.num_resumes += 1
        delay, self._delay = self._delay, min(self._delay * 2, MAX_DELAY)
        return delay
