"""The asynchronous client; the same calls as `Client`, for one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType

from octavo.protocol.errors import OctavoError
from octavo_client.options import Options, Prompt
from octavo_client.results import Delta, Generation
from octavo_client.stream_state import StreamState
from octavo_client.transport import AsyncTransport, TransportLost, split_url


class AsyncClient:
    """See `Client`."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:9965",
        *,
        api_key: str | None = None,
        patience: float = 30.0,
        transport: AsyncTransport | None = None,
    ) -> None:
        self._transport = transport or _transport(*split_url(url), api_key)
        self._patience = patience

    async def stream(
        self, prompt: Prompt, *, options: Options | None = None, req_id: str | None = None
    ) -> AsyncGenerator[Delta, None]:
        """The answer piece by piece. Closing the iterator (or cancelling the task) cancels the generation."""
        async with aclosing(self._run(self._state(prompt, options, req_id))) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(
        self, prompt: Prompt, *, options: Options | None = None, req_id: str | None = None
    ) -> Generation:
        """The whole answer."""
        state = self._state(prompt, options, req_id)
        async with aclosing(self._run(state)) as deltas:
            async for _ in deltas:
                pass
        return state.result

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without a chat template."""
        ids = (await self._transport.call({"op": "tokenize", "text": text}, timeout=30.0))["tokens"]
        assert isinstance(ids, list)
        return ids

    async def detokenize(self, token_ids: list[int]) -> str:
        """The text of token ids."""
        return str((await self._transport.call({"op": "detokenize", "tokens": token_ids}, timeout=30.0))["text"])

    async def abort(self, req_id: str) -> bool:
        """End a generation; False if there was none of that id."""
        return bool((await self._transport.call({"op": "abort", "req_id": req_id}, timeout=30.0))["aborted"])

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _state(self, prompt: Prompt, options: Options | None, req_id: str | None) -> StreamState:
        return StreamState(prompt, options or Options(), req_id=req_id, clock=time.monotonic, patience=self._patience)

    async def _run(self, state: StreamState) -> AsyncGenerator[Delta, None]:
        while not state.done:
            try:
                async with aclosing(self._attempt(state)) as deltas:
                    async for delta in deltas:
                        yield delta
            except (TransportLost, OctavoError) as error:
                await asyncio.sleep(state.lost(error))

    async def _attempt(self, state: StreamState) -> AsyncGenerator[Delta, None]:
        messages = self._transport.stream(state.request(), timeout=state.remaining)
        async with aclosing(messages):
            async for message in messages:
                delta = state.feed(message)
                if delta is not None:
                    yield delta
        if not state.done:
            raise TransportLost("the stream ended before its last message")


def _transport(kind: str, address: str, api_key: str | None) -> AsyncTransport:
    if kind == "http":
        from octavo_client.http import AsyncHttpTransport

        return AsyncHttpTransport(address, api_key=api_key)
    from octavo_client.grpc import AsyncGrpcTransport

    return AsyncGrpcTransport(address)
