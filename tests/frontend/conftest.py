"""A front end on a fake engine over real ZeroMQ, with a byte tokenizer; everything in a private run directory."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fakes.engine import FakeEngine
from octavo.frontend.frontend import FrontEnd
from octavo.settings import Settings
from octavo.text.tokenizer import Tokenizer
from text.vocabularies import bytes_only


class Inbox:
    """A sink that keeps decoded messages."""

    def __init__(self) -> None:
        self.messages: queue.Queue[tuple[dict[str, Any], bool]] = queue.Queue()
        self.gone = threading.Event()

    def send(self, payload: bytes, final: bool) -> None:
        value = json.loads(payload)
        self.messages.put((value[0] if isinstance(value, list) else value, final))

    def cancelled(self) -> bool:
        return self.gone.is_set()

    def next(self, timeout: float = 5.0) -> dict[str, Any]:
        return self.messages.get(timeout=timeout)[0]

    def all(self, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Every message up to the final one, and none after it."""
        out = []
        while True:
            message, final = self.messages.get(timeout=timeout)
            out.append(message)
            if final:
                time.sleep(0.02)
                assert self.messages.empty(), "a message after the final one"
                return out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition: Callable[[], bool], timeout: float = 5.0) -> None:
    limit = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.005)


@dataclass
class House:
    """One front end with its engines."""

    run_dir: Path
    environ: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None
    generation_config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.engines: list[FakeEngine] = []
        self._frontend: FrontEnd | None = None

    @property
    def settings(self) -> Settings:
        given = {"RUN_DIR": str(self.run_dir), "INFER_QUEUE_PORT": str(self.port), "OCTAVO_NODE": "1",
                 "BATCH_SIZE": "8", "MAX_DEC_LEN": "512", **self.environ}
        return Settings.from_environ(given)

    def engine(self, **options: Any) -> FakeEngine:
        options.setdefault("batch_size", self.settings.batch_size)
        engine = FakeEngine(self.port, self.run_dir, **options).start()
        self.engines.append(engine)
        return engine

    @property
    def frontend(self) -> FrontEnd:
        if self._frontend is None:
            tokenizer = Tokenizer(bytes_only(), chat_template=self.chat_template,
                                  generation_config=self.generation_config)
            self._frontend = FrontEnd(self.settings, tokenizer=tokenizer)
        return self._frontend

    def ready(self, **options: Any) -> House:
        self.engine(**options)
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        wait_for(lambda: self.op("info")["state"] == "ready")

    def send(self, **body: Any) -> Inbox:
        inbox = Inbox()
        self.frontend.submit(json.dumps([body]).encode(), "", inbox)
        return inbox

    def ask(self, **body: Any) -> list[dict[str, Any]]:
        return self.send(**body).all()

    def op(self, name: str, **body: Any) -> dict[str, Any]:
        (answer,) = self.ask(op=name, **body)
        return answer

    def close(self) -> None:
        if self._frontend is not None:
            self._frontend.finalize()
        for engine in self.engines:
            engine.die()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path / "run")
    yield made
    made.close()
