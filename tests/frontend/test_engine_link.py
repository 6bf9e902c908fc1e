"""The link by itself: an engine of its own, deaths of the child, fencing; and what must not block what."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.engine import FakeEngine
from frontend.conftest import House, free_port, wait_for
from frontend.test_requests import check_stream
from octavo.frontend.engine_link import EngineLink
from octavo.frontend.engine_process import EngineProcess
from octavo.frontend.frontend import FrontEnd
from octavo.settings import Settings
from octavo.text.tokenizer import Tokenizer
from text.vocabularies import bytes_only

FAKE = str(Path(__file__).resolve().parents[1] / "fakes" / "engine.py")


class Heard:
    """Events of a link, in order."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def on_loading(self, stage, fraction) -> None:
        self.events.append(("loading", stage))

    def on_attached(self, info, stats, epoch, *, same_engine) -> None:
        self.events.append(("attached", epoch))

    def on_detached(self, reason, *, for_good=False) -> None:
        self.events.append(("gone" if for_good else "detached", reason))

    def on_stats(self, stats) -> None:
        pass

    def on_step(self, step) -> None:
        pass

    def count(self, kind: str) -> int:
        return sum(event[0] == kind for event in self.events)


@pytest.fixture
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    given = {"RUN_DIR": str(tmp_path / "run"), "INFER_QUEUE_PORT": str(free_port()), "BATCH_SIZE": "4"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return given


@pytest.fixture
def alone(environ: dict[str, str]) -> Iterator[FrontEnd]:
    """A front end without a node: it starts its engine."""
    settings = Settings.from_environ(environ)
    process = EngineProcess(settings, clock=time.monotonic, command=[sys.executable, FAKE, "--rate", "200"])
    frontend = FrontEnd(settings, tokenizer=Tokenizer(bytes_only()),
                        link=lambda events: EngineLink(settings, events=events, process=process))
    frontend.process = process
    yield frontend
    frontend.finalize()


def test_without_a_node_the_front_end_starts_and_ends_its_engine(alone: FrontEnd) -> None:
    wait_for(lambda: alone.registry.engine.info is not None)
    child = alone.process._process
    alone.finalize()
    assert child.poll() == 0


def test_an_engine_that_was_killed_is_started_again(alone: FrontEnd) -> None:
    wait_for(lambda: alone.registry.engine.info is not None)
    from frontend.conftest import Inbox

    inbox = Inbox()
    alone.submit(b'{"text": "hi", "req_id": "a", "max_dec_len": 40}', "", inbox)
    first = inbox.next()
    child = alone.process._process
    os.kill(child.pid, signal.SIGKILL)
    assert check_stream([first, *inbox.all()])["tokens_all_num"] == 40
    assert alone.process._process is not child


def test_bad_settings_end_it_for_good(environ: dict[str, str]) -> None:
    settings, heard = Settings.from_environ(environ), Heard()
    process = EngineProcess(settings, clock=time.monotonic, command=[sys.executable, "-c", "raise SystemExit(2)"])
    link = EngineLink(settings, events=heard, process=process)
    link.start()
    wait_for(lambda: heard.count("gone") == 1)
    assert heard.events[-1] == ("gone", "the engine ended with code 2: bad settings or model")
    link.close(2)


def test_a_newer_front_end_fences_this_one(environ: dict[str, str]) -> None:
    settings = Settings.from_environ(environ)
    engine = FakeEngine(settings.infer_queue_port, settings.run_dir).start()
    older, newer = Heard(), Heard()
    links = [EngineLink(settings, events=heard, process=None, epoch=lambda value=value: value)
             for heard, value in ((older, 1), (newer, 2))]
    links[0].start()
    wait_for(lambda: older.count("attached") == 1)
    links[1].start()
    wait_for(lambda: older.count("gone") == 1)
    assert newer.events[-1] == ("attached", 2)
    for link in links:
        link.close(2)
    engine.die()


def test_an_engine_of_other_settings_is_told_to_end(environ: dict[str, str]) -> None:
    settings, heard = Settings.from_environ(environ), Heard()
    left_over = FakeEngine(settings.infer_queue_port, settings.run_dir, fingerprint="old").start()
    process = EngineProcess(settings, clock=time.monotonic, command=[sys.executable, "-c", "raise SystemExit(4)"])
    link = EngineLink(settings, events=heard, process=process, fingerprint="new")
    link.start()
    wait_for(lambda: not left_over.alive)
    engine = FakeEngine(settings.infer_queue_port, settings.run_dir, fingerprint="new").start()
    wait_for(lambda: heard.count("attached") == 1)
    link.close(2)
    engine.die()


def test_each_session_has_a_higher_epoch(environ: dict[str, str]) -> None:
    settings, heard = Settings.from_environ(environ), Heard()
    link = EngineLink(settings, events=heard, process=None)
    link.start()
    for count in (1, 2):
        engine = FakeEngine(settings.infer_queue_port, settings.run_dir).start()
        wait_for(lambda count=count: heard.count("attached") == count)
        engine.die()
        wait_for(lambda count=count: heard.count("detached") >= count)
    epochs = [event[1] for event in heard.events if event[0] == "attached"]
    assert epochs[0] < epochs[1]
    link.close(2)


def test_a_long_prompt_does_not_hold_up_delivery(house: House) -> None:
    house.environ["MAX_SEQ_LEN"] = "2000000"
    house.ready(rate=400, context_length=1 << 21, num_blocks=1 << 16)
    streaming = house.send(text="hi", req_id="a", max_dec_len=400)
    streaming.next()
    long = house.send(text="wörld " * 120_000, req_id="b", max_dec_len=1)
    begun = time.monotonic()
    during, answers = 0, []
    waiter = threading.Thread(target=lambda: answers.append(long.all(30)))
    waiter.start()
    while waiter.is_alive():
        during += not streaming.messages.empty() and bool(streaming.next())
        time.sleep(0.0005)
    seconds = time.monotonic() - begun
    assert answers[0][-1]["usage"]["prompt_tokens"] == 840_000
    assert during > 0.3 * 400 * min(seconds, 0.9)
    house.op("abort", req_id="a")
