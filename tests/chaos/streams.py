"""Many streams over HTTP in a thread of their own, plain or through the client library, and what became of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from chaos.scoreboard import Row
from octavo_client import AsyncClient, Options

PROMPTS = ["hello, llm", "写一个故事", "List 3 countries and their capitals.", "你好!", "晚上睡不着觉怎么办？"]


@dataclass
class Stream:
    """One request and what has come of it so far."""

    index: int
    num_tokens: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    error: str = ""
    next_idx: int = 0
    longest_gap: float = 0.0
    heard_at: float = 0.0

    @property
    def ended(self) -> bool:
        return bool(self.finish_reason or self.error)

    @property
    def prompt(self) -> str:
        return PROMPTS[self.index % len(PROMPTS)]

    @property
    def options(self) -> Options:
        return Options(infer_seed=self.index, temperature=self.index % 3 / 2, max_dec_len=self.num_tokens,
                       min_dec_len=self.num_tokens, ignore_eos=True, timeout=280.0)

    def hear(self, *, text: str, token_ids: list[int], send_idx: int, finish_reason: str | None) -> None:
        now = time.monotonic()
        if self.heard_at:
            self.longest_gap = max(self.longest_gap, now - self.heard_at)
        self.heard_at = now
        if send_idx != self.next_idx:
            self.error = f"message {self.next_idx} expected, {send_idx} came"
        self.next_idx = send_idx + 1
        self.text += text
        self.token_ids += token_ids
        self.finish_reason = finish_reason or ""


async def run_plain(http: httpx.AsyncClient, stream: Stream) -> None:
    """As curl would: a closed connection is the end."""
    body = {"text": stream.prompt, "stream": True, **stream.options.payload()}
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                stream.error = f"{response.status_code}: {(await response.aread())[:300]!r}"
                return
            async for line in response.aiter_lines():
                message = json.loads(line)
                if message["error_msg"]:
                    stream.error = f"{message['error_code']}: {message['error_msg']}"
                    return
                stream.hear(text=message["token"], token_ids=message["token_ids"], send_idx=message["send_idx"],
                            finish_reason=message.get("finish_reason"))
        stream.error = stream.error or ("" if stream.ended else "closed before its end")
    except (httpx.HTTPError, ValueError) as error:
        stream.error = f"{type(error).__name__}: {error}"


async def run_client(client: AsyncClient, stream: Stream) -> None:
    """Through the client library, which takes a lost stream up again."""
    try:
        async for delta in client.stream(stream.prompt, options=stream.options):
            stream.hear(text=delta.text, token_ids=list(delta.token_ids), send_idx=delta.send_idx,
                        finish_reason=delta.finish_reason)
    except Exception as error:
        stream.error = f"{type(error).__name__}: {error}"


class Crowd:
    """Streams that run in a thread until they have ended."""

    def __init__(self, url: str, *, count: int, num_tokens: int, through_client: bool = False) -> None:
        self.streams = [Stream(index, num_tokens) for index in range(count)]
        self._url = url
        self._through_client = through_client
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._cancel = threading.Event()

    def __enter__(self) -> Crowd:
        self.began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cancel.set()
        self._thread.join(30)

    async def _run(self) -> None:
        if self._through_client:
            async with AsyncClient(self._url) as client:
                await self._all([run_client(client, stream) for stream in self.streams])
        else:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=self._url, timeout=120, limits=limits, trust_env=False) as http:
                await self._all([run_plain(http, stream) for stream in self.streams])

    async def _all(self, work: list) -> None:
        tasks = [asyncio.create_task(one) for one in work]
        while not all(task.done() for task in tasks) and not self._cancel.is_set():
            await asyncio.wait(tasks, timeout=0.1)
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @property
    def num_tokens(self) -> int:
        return sum(len(stream.token_ids) for stream in self.streams)

    @property
    def num_in_flight(self) -> int:
        return sum(not stream.ended for stream in self.streams)

    def wait_tokens(self, more: int, *, seconds: float = 60.0) -> None:
        """Wait until that many more tokens have come in all."""
        wanted, deadline = self.num_tokens + more, time.monotonic() + seconds
        while self.num_tokens < wanted:
            assert self.num_in_flight, f"all streams have ended: {[stream.error for stream in self.streams][:3]}"
            assert time.monotonic() < deadline, f"{self.num_tokens} of {wanted} tokens"
            time.sleep(0.01)

    def wait_all_started(self, *, seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not all(stream.token_ids or stream.ended for stream in self.streams):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_end(self, *, seconds: float = 120.0) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self.num_in_flight} streams have not ended in {seconds} s"

    def judge(self, row: Row, reference: list[Stream], *, late_seconds: float) -> None:
        """Enter these streams into a row of the scoreboard."""
        row.streams += len(self.streams)
        for stream, undisturbed in zip(self.streams, reference, strict=True):
            if stream.error or not stream.finish_reason:
                print(f"lost: stream {stream.index} after {len(stream.token_ids)} tokens: {stream.error}")
                row.lost += 1
            elif (stream.token_ids, stream.text) != (undisturbed.token_ids, undisturbed.text):
                at = next((k for k, pair in enumerate(zip(stream.token_ids, undisturbed.token_ids))
                           if pair[0] != pair[1]), len(stream.token_ids))
                print(f"changed: stream {stream.index} at token {at} of {len(stream.token_ids)}")
                row.changed += 1
            elif stream.longest_gap > late_seconds:
                print(f"late: stream {stream.index} paused for {stream.longest_gap:.1f} s")
                row.late += 1
