"""The stand-in for msgspec that the tests and the benchmark of a card use where msgspec is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gpu.without_msgspec import stand_in
from octavo.protocol import messages

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "msgspec" else real(name, *rest)  # as if not installed
from gpu.without_msgspec import provide
provide()
provide()
from octavo.engine import core, gpu_runner, load
from octavo.protocol.messages import SamplingParams, SequenceOutput, Submit
print(repr(SamplingParams(4)), repr(Submit(1, [2], SamplingParams(3))), repr(SequenceOutput(1, [2])), sep="\\n")
"""


def test_the_engine_loads_without_msgspec_and_its_messages_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT / 'serving'}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    params = messages.SamplingParams(4)
    submit = messages.Submit(1, [2], messages.SamplingParams(3))
    assert done.stdout.splitlines() == [repr(params), repr(submit), repr(messages.SequenceOutput(1, [2]))]


def test_it_copies_defaults_replaces_fields_and_has_no_wire() -> None:
    module = stand_in()

    class Message(module.Struct, frozen=True, tag="message"):  # type: ignore[name-defined, misc]
        name: str
        tokens: list[int] = []  # noqa: RUF012

    first, second = Message("a"), Message("b")
    first.tokens.append(1)
    assert second.tokens == []
    assert module.structs.replace(second, name="c") == Message("c")
    with pytest.raises(AttributeError):
        second.name = "d"
    with pytest.raises(NotImplementedError, match="stand-in"):
        module.msgpack.Encoder()
