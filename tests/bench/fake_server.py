"""A tiny OpenAI-compatible and native server on raw sockets, with faults: what the benchmark is tested against."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field

Reply = tuple[int, list[bytes], bool]  # status, pieces of the body, whether the body is complete


@dataclass
class FakeServer:
    """Answers from a thread of its own. `faults[i]` replaces the answer to the i-th generation request."""

    usage: bool = True
    refuses: tuple[str, ...] = ()  # body fields answered with 400
    tokens_a_word: int = 1
    longest: int | None = None  # prompt, in tokens
    takes_ids: bool = True
    key: str | None = None
    models: tuple[str, ...] = ("small",)
    delay: float = 0.0  # seconds before each token
    one_write: bool = False  # all of an answer in one segment
    faults: dict[int, str] = field(default_factory=dict)
    bodies: list[dict] = field(default_factory=list)
    num_connections: int = 0
    most_at_once: int = 0
    port: int = 0

    def __enter__(self) -> FakeServer:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)))
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop, self._running = asyncio.get_running_loop(), asyncio.Event(), 0
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                first, *lines = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self._running += 1
                self.most_at_once = max(self.most_at_once, self._running)
                try:
                    await self._answer(first.split()[1], headers, body, writer)
                finally:
                    self._running -= 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            return _whole(writer, 401, {"error": {"message": "no such key"}})
        if path == "/v1/models":
            return _whole(writer, 200, {"data": [{"id": name} for name in self.models]})
        asked = json.loads(body)
        fault = self.faults.get(len(self.bodies))
        self.bodies.append(asked)
        for name in self.refuses:
            if name in asked:
                return _whole(writer, 400, {"error": {"message": f"unknown field {name}"}})
        if asked.get("model", self.models[0]) not in self.models:
            return _whole(writer, 404, {"error": {"message": "no such model"}})
        if not self.takes_ids and isinstance(asked.get("prompt"), list):
            return _whole(writer, 400, {"detail": "prompt must be a string"})
        if self.longest is not None and _length(asked) * self.tokens_a_word > self.longest:
            return _whole(writer, 400, {"error": {"message": f"the longest prompt is {self.longest}"}})
        if fault is not None and fault.isdigit():
            return _whole(writer, int(fault), {"error": {"message": "busy"}})
        await self._stream(asked, fault, writer)

    async def _stream(self, asked: dict, fault: str | None, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        native = "max_dec_len" in asked
        pieces = _native(asked, fault) if native else _events(asked, fault, self.tokens_a_word)
        if not self.usage and not native:
            pieces = [piece for piece in pieces if b'"usage"' not in piece]
        if self.one_write:
            pieces = [b"".join(pieces)]
        for piece in pieces:
            if self.delay:
                await asyncio.sleep(self.delay)
            half = len(piece) // 2  # chunks end in the middle of lines
            for part in (piece[:half], piece[half:]):
                writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n" if part else b"")
            await writer.drain()
        if fault == "drop":
            writer.transport.abort()
            return
        writer.write(b"0\r\n\r\n")
        await writer.drain()


def _whole(writer: asyncio.StreamWriter, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


def _length(asked: dict) -> int:
    """Of the prompt in token ids or words."""
    prompt = asked.get("prompt") or asked["messages"][0]["content"]
    return len(prompt if isinstance(prompt, list) else prompt.split())


def _events(asked: dict, fault: str | None, tokens_a_word: int) -> list[bytes]:
    chat, count, length = "messages" in asked, asked["max_tokens"], _length(asked) * tokens_a_word
    chunks: list[object] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}] if chat else []
    for index in range(1 if fault in ("drop", "cut", "error") else count):
        text = f" t{index}"
        chunks.append({"choices": [{"delta": {"content": text}} if chat else {"text": text, "index": 0}]})
    if fault == "error":
        chunks.append({"error": {"message": "out of memory", "code": 500}})
    elif fault not in ("drop", "cut"):
        end = {"delta": {}, "finish_reason": "length"} if chat else {"text": "", "finish_reason": "length"}
        chunks.append({"choices": [end]})
        usage = {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count}
        chunks.append({"choices": [], "usage": usage})
    lines = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    return lines if fault in ("drop", "cut", "error") else [b": hello\n\n", *lines, b"data: [DONE]\n\n"]


def _native(asked: dict, fault: str | None) -> list[bytes]:
    count = asked["max_dec_len"]
    lines = [{"token": " a", "token_ids": [7], "send_idx": index, "is_end": 0} for index in range(count - 1)]
    usage = {"prompt_tokens": 5, "completion_tokens": count + 1, "total_tokens": 0}
    last = {"token": " z", "token_ids": [8], "send_idx": count - 1, "is_end": 1, "usage": usage}
    if fault == "error":
        last = {"error_msg": "the engine is down", "error_code": 503}
    return [json.dumps({"error_msg": "", "error_code": 0, **line}).encode() + b"\n" for line in [*lines, last]]
