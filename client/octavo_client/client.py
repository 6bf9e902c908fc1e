"""The synchronous client. One thread at a time may use a stream; a client may be shared between threads."""

from __future__ import annotations

import time
from collections.abc import Generator
from types import TracebackType

from octavo.protocol.errors import OctavoError
from octavo_client.options import Options, Prompt
from octavo_client.results import Delta, Generation
from octavo_client.stream_state import StreamState
from octavo_client.transport import Transport, TransportLost, split_url


class Client:
    """Generations over HTTP (`http://host:9965`) or gRPC (`grpc://host:8811`).

    `patience`: for how many seconds a lost stream is taken up again before its error is raised.
    Errors are OctavoError (what the server said) or TransportLost (it could not be reached).
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:9965",
        *,
        api_key: str | None = None,
        patience: float = 30.0,
        transport: Transport | None = None,
    ) -> None:
        self._transport = transport or _transport(*split_url(url), api_key)
        self._patience = patience

    def stream(
        self, prompt: Prompt, *, options: Options | None = None, req_id: str | None = None
    ) -> Generator[Delta, None, None]:
        """The answer piece by piece, as the tokens come. Closing the iterator cancels the generation."""
        yield from self._run(self._state(prompt, options, req_id))

    def generate(self, prompt: Prompt, *, options: Options | None = None, req_id: str | None = None) -> Generation:
        """The whole answer."""
        state = self._state(prompt, options, req_id)
        for _ in self._run(state):
            pass
        return state.result

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without a chat template."""
        ids = self._transport.call({"op": "tokenize", "text": text}, timeout=30.0)["tokens"]
        assert isinstance(ids, list)
        return ids

    def detokenize(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        return str(self._transport.call({"op": "detokenize", "tokens": token_ids}, timeout=30.0)["text"])

    def abort(self, req_id: str) -> bool:
        """End a generation; False if there was none of that id."""
        return bool(self._transport.call({"op": "abort", "req_id": req_id}, timeout=30.0)["aborted"])

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _state(self, prompt: Prompt, options: Options | None, req_id: str | None) -> StreamState:
        return StreamState(prompt, options or Options(), req_id=req_id, clock=time.monotonic, patience=self._patience)

    def _run(self, state: StreamState) -> Generator[Delta, None, None]:
        while not state.done:
            try:
                yield from self._attempt(state)
            except (TransportLost, OctavoError) as error:
                time.sleep(state.lost(error))

    def _attempt(self, state: StreamState) -> Generator[Delta, None, None]:
        for message in self._transport.stream(state.request(), timeout=state.remaining):
            delta = state.feed(message)
            if delta is not None:
                yield delta
        if not state.done:
            raise TransportLost("the stream ended before its last message")


def _transport(kind: str, address: str, api_key: str | None) -> Transport:
    if kind == "http":
        from octavo_client.http import HttpTransport

        return HttpTransport(address, api_key=api_key)
    from octavo_client.grpc import GrpcTransport

    return GrpcTransport(address)
