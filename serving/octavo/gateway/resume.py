"""What one request has received so far, and the request that continues it.

Owned by the upstream stream of that request, on the gateway's event loop. Knows nothing of gRPC: it turns token
messages into the `generated_token_ids` and `send_idx` that a restarted server needs to go on where the last one
stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from octavo.protocol.answers import TokenMessage
from octavo.protocol.carrier import Carried

MAX_CHOICES = 128


@dataclass
class Choice:
    """The tokens of one choice that were passed on."""

    token_ids: list[int] = field(default_factory=list)
    next_send_idx: int = 0
    finished: bool = False


class Progress:
    """Keeps a request resumable: same body, same seed, plus the tokens that its holder has."""

    def __init__(self, request: Mapping[str, object]) -> None:
        self.request = dict(request)
        n = request.get("n")
        count = n if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_CHOICES else 1
        self.choices = [Choice() for _ in range(count)]
        self.num_open = count
        self.attempt = self._first_attempt = _whole(request.get("attempt"))
        self.reached = False  # the server may have accepted it
        self.held = False  # it was sent in vain before: a server that is starting is no answer any more
        self.received = False
        self.closed = False  # the server has said its last word: nothing is left to abort
        self.req_id, self.infer_seed = "", 0  # as the first message of an attempt says them
        self._fingerprint: str | None = None
        self._take_over(request)

    @property
    def resumed(self) -> bool:
        """Whether the gateway itself has lost a stream of this request; an attempt from outside is not that."""
        return self.attempt > self._first_attempt

    def lost(self, *, reached: bool) -> None:
        """An attempt was in vain; `reached`: the server may have accepted it, so the next one supersedes it."""
        self.held = True
        self.reached |= reached
        self.attempt += self.reached

    def _take_over(self, request: Mapping[str, object]) -> None:
        """A request may itself be a resumption: go on counting from what it brings. The front end validates it."""
        tokens, indexes = request.get("generated_token_ids"), request.get("send_idx")
        if len(self.choices) == 1:
            tokens, indexes = [tokens], [indexes]
        for at, choice in enumerate(self.choices):
            if isinstance(tokens, list) and at < len(tokens) and isinstance(tokens[at], list):
                choice.token_ids = list(tokens[at])
            if isinstance(indexes, list) and at < len(indexes):
                choice.next_send_idx = _whole(indexes[at])

    def accept(self, message: TokenMessage | Carried) -> bool:
        """Count a message; False if it repeats what was passed on before."""
        if type(message) is Carried:
            return self._accept_tokens(message)
        if not 0 <= message.index < len(self.choices):
            return False
        choice = self.choices[message.index]
        if choice.finished or message.send_idx < choice.next_send_idx:
            return False
        self.received = True
        choice.token_ids += message.token_ids
        choice.next_send_idx = message.send_idx + 1
        self._fingerprint = message.fingerprint or self._fingerprint
        if message.is_end:
            choice.finished = True
            self.num_open -= 1
            self.closed = self.num_open == 0
        return True

    def _accept_tokens(self, message: Carried) -> bool:
        """The common case: new tokens of the only choice."""
        choice = self.choices[0]
        if choice.finished or message.send_idx < choice.next_send_idx:
            return False
        choice.token_ids += message.token_ids
        choice.next_send_idx = message.send_idx + 1
        return True

    def resumption(self, seconds_left: float) -> dict[str, object]:
        """The body to send now: the original one at first, then with tokens, indexes and what time is left."""
        if not self.resumed:
            return self.request
        body = {**self.request, "attempt": self.attempt, "resume_inside": True, "timeout": max(0.001, seconds_left)}
        if self.received:
            single = len(self.choices) == 1
            tokens = [choice.token_ids for choice in self.choices]
            indexes = [choice.next_send_idx for choice in self.choices]
            body["generated_token_ids"] = tokens[0] if single else tokens
            body["send_idx"] = indexes[0] if single else indexes
            for sent_already in ("return_prompt", "prompt_logprobs"):
                body.pop(sent_already, None)
        if self._fingerprint is not None:
            body["fingerprint"] = self._fingerprint
        return body


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
