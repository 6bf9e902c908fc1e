"""A stand-in for the engine process: the same messages over ZeroMQ, tokens from (seed, position), faults on request.

As a thread in tests (`FakeEngine`), or as a process for benchmarks: `python tests/fakes/engine.py --rate 20000`, which
takes RUN_DIR, INFER_QUEUE_PORT and BATCH_SIZE from the environment like the real one. No model, no cache.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from octavo.protocol import messages as m
from octavo.settings import Settings

HEARTBEAT_SECONDS = 0.2


def default_token(submit: m.Submit, position: int) -> int:
    """Looks random, depends on seed and position alone; 32..126, printable in a byte-level vocabulary of bytes."""
    value = (submit.params.seed * 6364136223846793005 + position * 1442695040888963407) & ((1 << 64) - 1)
    return 32 + (value >> 33) % 95


@dataclass
class FakeSequence:
    submit: m.Submit
    position: int  # output tokens so far
    first: bool = True
    scheduled_at: float = 0.0


@dataclass
class Faults:
    """What goes wrong; tests set these while it runs."""

    stalled: bool = False  # neither steps nor heartbeats
    paused: bool = False  # heartbeats, but no steps
    refuse: str | None = None  # answer Attach with this
    submit_error: str | None = None  # end each new sequence with this
    loading: float = 0.0  # 0..1: say Loading and do not attach


@dataclass
class FakeEngine:
    """`start`, `die`. `rate`: tokens per second over all sequences (0: as fast as it goes)."""

    port: int
    run_dir: Path
    rate: float = 0.0
    batch_size: int = 8
    vocab_size: int = 512
    context_length: int = 4096
    num_blocks: int = 256
    tokens_per_step: int = 1
    end_token_ids: tuple[int, ...] = ()
    fingerprint: str = "fake-1"
    token_of: Callable[[m.Submit, int], int] = default_token
    faults: Faults = field(default_factory=Faults)
    submitted: list[m.Submit] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)

    def start(self) -> FakeEngine:
        self._prepare()
        self._thread = threading.Thread(target=self.run, name="fake-engine", daemon=True)
        self._thread.start()
        return self

    def _prepare(self) -> None:
        self.key = secrets.token_hex(16)
        self.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.run_dir / "engine.key").write_text(self.key)
        self._waiting: deque[FakeSequence] = deque()
        self._running: dict[int, FakeSequence] = {}
        self._peer: bytes | None = None
        self._epoch = 0
        self._steps = self.num_tokens = 0
        self._over = self._cancel_all = False
        self._bound = threading.Event()
        self._encode = m.encoder().encode
        self._decode = m.engine_decoder().decode
        self._next_beat = self._next_step = 0.0

    def end(self) -> None:
        """Cancel everything, as an engine that is told to end does, then end."""
        self._cancel_all = True
        self._thread.join(5)

    def die(self) -> None:
        """Close the socket without a word and forget everything."""
        self._over = True
        self._thread.join(5)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def run(self) -> None:
        context = zmq.Context()
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(f"tcp://127.0.0.1:{self.port}")
        self._bound.set()
        try:
            while not self._over:
                self._turn()
        finally:
            self._socket.close(linger=0)
            context.destroy(linger=0)

    def _turn(self) -> None:
        now = time.monotonic()
        busy = bool(self._running or self._waiting) and not self.faults.paused
        wait = max(0.0, self._next_step - now) if busy else 0.02
        if self._socket.poll(math.ceil(wait * 1000) if wait > 0.0005 else 0):
            while self._socket.poll(0):
                peer, frame = self._socket.recv_multipart()
                if not self.faults.stalled:
                    self._receive(peer, self._decode(frame))
        if self.faults.stalled:
            return
        if self._cancel_all:
            self._abort(m.Abort([*self._running, *(sequence.submit.seq_id for sequence in self._waiting)]))
            time.sleep(0.05)
            self._over = True
        now = time.monotonic()
        if self._peer is not None and now >= self._next_beat:
            self._next_beat = now + HEARTBEAT_SECONDS
            self._send(m.Heartbeat(self._stats()))
        if busy and now >= self._next_step:
            self._step(now)

    def _receive(self, peer: bytes, message: m.ToEngine) -> None:
        if isinstance(message, m.Attach):
            self._attach(peer, message)
        elif isinstance(message, m.Shutdown):
            self._over = True
        elif peer != self._peer:
            return
        elif isinstance(message, m.Submit):
            self._submit(message)
        elif isinstance(message, m.Abort):
            self._abort(message)
        elif isinstance(message, m.Ping):
            self._send(m.Heartbeat(self._stats(), message.nonce))

    def _attach(self, peer: bytes, message: m.Attach) -> None:
        refusal = self._refusal(message)
        if refusal is not None:
            self._socket.send_multipart([peer, self._encode(refusal)])
            return
        while self.faults.loading and not self._over:
            self._socket.send_multipart([peer, self._encode(m.Loading("weights", self.faults.loading))])
            time.sleep(0.02)
        if self._peer is not None and self._peer != peer:
            self._send(m.Refused("a newer front end attached", "epoch"))
        self._peer, self._epoch = peer, message.epoch
        self._running.clear()
        self._waiting.clear()
        self._send(m.Attached(m.PROTOCOL_VERSION, self.info(), self._stats()))

    def _refusal(self, message: m.Attach) -> m.Refused | None:
        if self.faults.refuse is not None:
            return m.Refused(self.faults.refuse)
        if message.key != self.key:
            return m.Refused("wrong key", "key")
        if message.fingerprint not in ("", self.fingerprint):
            return m.Refused("another fingerprint", "fingerprint")
        return m.Refused("a newer front end is attached", "epoch") if message.epoch < self._epoch else None

    def info(self) -> m.EngineInfo:
        return m.EngineInfo(
            model_name="fake", architecture="Fake", context_length=self.context_length, vocab_size=self.vocab_size,
            num_blocks=self.num_blocks, block_size=64, batch_size=self.batch_size, end_token_ids=self.end_token_ids,
            fingerprint=self.fingerprint, weight_scheme="none", cache_scheme="none", kernels="none",
        )

    def _submit(self, message: m.Submit) -> None:
        self.submitted.append(message)
        if self.faults.submit_error is not None:
            output = m.SequenceOutput(message.seq_id, [], "error", error=self.faults.submit_error)
            self._send(m.StepOutputs([output], self._stats()))
            return
        self._waiting.append(FakeSequence(message, len(message.generated_token_ids)))

    def _abort(self, message: m.Abort) -> None:
        self.aborted += message.seq_ids
        known = {sequence.submit.seq_id for sequence in self._waiting} | set(self._running)
        ended = [seq_id for seq_id in message.seq_ids if seq_id in known]
        for seq_id in ended:
            self._running.pop(seq_id, None)
        self._waiting = deque(sequence for sequence in self._waiting if sequence.submit.seq_id not in ended)
        if ended:
            outputs = [m.SequenceOutput(seq_id, [], "cancelled") for seq_id in ended]
            self._send(m.StepOutputs(outputs, self._stats()))

    def _step(self, now: float) -> None:
        while self._waiting and len(self._running) < self.batch_size:
            sequence = self._waiting.popleft()
            sequence.scheduled_at = now
            self._running[sequence.submit.seq_id] = sequence
        outputs = [self._advance(sequence) for sequence in list(self._running.values())]
        for output in outputs:
            if output.finish_reason is not None:
                del self._running[output.seq_id]
        self._steps += 1
        count = sum(len(output.token_ids) for output in outputs)
        self.num_tokens += count
        if self.rate:
            self._next_step = max(self._next_step, now - 0.01) + count / self.rate
        self._send(m.StepOutputs(outputs, self._stats()))

    def _advance(self, sequence: FakeSequence) -> m.SequenceOutput:
        params, ids, reason = sequence.submit.params, [], None
        while reason is None and len(ids) < self.tokens_per_step:
            token = self.token_of(sequence.submit, sequence.position)
            sequence.position += 1
            ids.append(token)
            if token in params.end_token_ids and sequence.position >= params.min_tokens:
                reason = "stop"
            elif sequence.position >= params.max_tokens:
                reason = "length"
        first, sequence.first = sequence.first, False
        return m.SequenceOutput(
            sequence.submit.seq_id, ids, reason,
            logprobs=[_logprob(token, params.logprobs) for token in ids] if params.logprobs >= 0 else None,
            prompt_logprobs=_prompt_logprobs(sequence.submit) if first and params.prompt_logprobs >= 0 else None,
            scheduled_at=sequence.scheduled_at if first else 0.0,
        )

    def _stats(self) -> m.EngineStats:
        used = sum((len(s.submit.prompt_token_ids) + s.position) // 64 + 1 for s in self._running.values())
        return m.EngineStats(
            steps=self._steps, num_running=len(self._running), num_waiting=len(self._waiting),
            num_free_blocks=self.num_blocks - used, num_used_blocks=used, output_tokens=self.num_tokens,
            last_progress=time.monotonic(),
        )

    def _send(self, message: m.FromEngine) -> None:
        if self._peer is not None:
            self._socket.send_multipart([self._peer, self._encode(message)])


def _logprob(token: int, most: int) -> m.TokenLogprobs:
    return m.TokenLogprobs(token, -0.5, 1, tuple(range(65, 65 + most)), tuple(-1.0 - i for i in range(most)))


def _prompt_logprobs(submit: m.Submit) -> list[m.TokenLogprobs]:
    return [_logprob(token, submit.params.prompt_logprobs) for token in submit.prompt_token_ids[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=20_000.0, help="tokens per second over all sequences")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--context-length", type=int, default=16_384)
    options = parser.parse_args()
    settings = Settings.from_environ()
    engine = FakeEngine(
        settings.infer_queue_port, settings.run_dir, rate=options.rate, batch_size=settings.batch_size,
        vocab_size=options.vocab_size, context_length=options.context_length, num_blocks=1 << 16,
    )
    engine._prepare()
    print(f"fake engine on port {settings.infer_queue_port}, pid {os.getpid()}", flush=True)
    engine.run()


if __name__ == "__main__":
    main()
