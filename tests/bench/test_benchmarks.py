"""The repository's benchmark programs: their arithmetic and their loops, without a model."""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from octavo.engine.core import EngineCore, make_scheduler
from scheduling.fake_runner import FakeRunner, make_info

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """Imports a program of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load


class FakeStepper:
    """Computes four prompt tokens of each a step, then one token a step."""

    def __init__(self) -> None:
        self.living: dict[int, list[int]] = {}
        self.next = 0

    def add(self, prompt: list[int], output: int) -> int:
        self.next += 1
        self.living[self.next] = [len(prompt), output]
        return self.next

    def step(self) -> list[tuple[int, int, bool]]:
        out = []
        for name, left in list(self.living.items()):
            left[0] -= 4
            if left[0] <= 0:
                left[1] -= 1
                out.append((name, 1, not left[1]))
                if not left[1]:
                    del self.living[name]
        return out

    def cancel(self, names: list[int]) -> None:
        for name in names:
            del self.living[name]


def test_a_driver_measures_any_engine_and_leaves_nothing_running(program) -> None:
    peer = program("protocol").SteppedPeer()
    peer.engine = engine = FakeStepper()
    assert peer.prompt(100)["tok_s"] > 0
    assert peer.fill(8, 40)["tok_s"] > 0
    assert len(engine.living) == 8
    assert peer.decode(5)["tok_s"] > 0
    peer.shrink(3)
    assert len(engine.living) == 3
    peer.shrink(0)
    served = peer.serve(12, 4, 20, 6)
    assert set(served) == {"tok_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms"}
    assert engine.living == {}


def test_a_driver_answers_line_by_line_and_survives_an_error(program, monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = program("protocol")
    out, ended = io.StringIO(), []
    monkeypatch.setattr(protocol.sys, "argv", ["driver"])
    asked = [{"op": "load", "folder": "x", "threads": 2}, {"op": "prompt", "tokens": 8}, {"op": "quit"}]
    monkeypatch.setattr(protocol.sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in asked)))
    monkeypatch.setattr(protocol.os, "dup", lambda number: 1)
    monkeypatch.setattr(protocol.os, "dup2", lambda source, target: None)
    monkeypatch.setattr(protocol.os, "fdopen", lambda number, mode: out)
    monkeypatch.setattr(protocol.os, "_exit", ended.append)
    protocol.main(lambda folder, threads: protocol.SteppedPeer())  # it has no engine
    loaded, failed = map(json.loads, out.getvalue().splitlines())
    assert loaded["load_s"] >= 0
    assert failed["error"].startswith("AttributeError")
    assert ended == [0]


def test_ratios_are_above_one_where_ours_is_better(program) -> None:
    ours = {"decode_1": {"tok_s": 30.0, "runs": 5}, "serve_16": {"itl_p50_ms": 50.0}, "load": {"load_s": 4.0}}
    others = {
        "a": {"decode_1": {"tok_s": 20.0, "runs": 5}, "serve_16": {"itl_p50_ms": 100.0}, "load": {"load_s": 2.0}},
        "b": {"decode_1": {"tok_s": 24.0, "runs": 5}},
    }
    found = program("peer_report").ratios(ours, others)
    assert found["decode_1.tok_s"] == {"ours": 30.0, "best": 24.0, "peer": "b", "ratio": 1.25}
    assert found["serve_16.itl_p50_ms"]["ratio"] == 2.0
    assert found["load.load_s"]["ratio"] == 0.5
    assert set(found) == {"decode_1.tok_s", "serve_16.itl_p50_ms", "load.load_s"}


def make_session(program, rates: dict[str, float], *, room: float | None = None):
    """Peers whose prompts of 2 048 ran at these rates."""
    peers = program("peers")
    made = [peers.Peer(name, "", Path(), Path()) for name in rates]
    for peer in made:
        peer.figures = {"prompt_2048": [{"tok_s": rates[peer.name]}] if rates[peer.name] else []}
        peer.figures = {name: rows for name, rows in peer.figures.items() if rows}
        peer.figures["load"] = [{"load_s": 1.0} if room is None else {"load_s": 1.0, "room": room}]
    return peers.Session(made, 2, 0.0, None)


def test_long_figures_are_repeated_for_those_in_reach_of_the_best(program) -> None:
    session = make_session(program, {"fast": 60.0, "slow": 20.0, "new": 0.0})
    fast, slow, new = session.peers
    assert session.contenders("prompt_2048") == [fast, new]
    assert session.contenders("serve_16") == [fast, slow, new]


def test_long_batches_are_those_that_a_peer_fills_in_time(program) -> None:
    peers = program("peers")
    session = make_session(program, {"fast": 5000.0, "middling": 500.0, "slow": 60.0, "new": 0.0})
    assert [session.affordable(peer, peers.LONG) for peer in session.peers] == [32, 16, 1, 0]
    session = make_session(program, {"fast": 5000.0}, room=4 * 2048)
    assert session.affordable(session.peers[0], peers.LONG) == 4


def test_the_limit_is_that_of_reading_or_of_the_faster_instruction(program) -> None:
    meter, model = program("meter"), program("standard_model")
    rates = meter.Rates(read=40.0, vectors=2000.0, tiles=15_000.0)
    num_bytes = model.WEIGHTS + model.HEAD_WEIGHTS
    assert meter.seconds_per_token("decode_4", 1, rates, cache=False) == (num_bytes / 40e9 / 4, "reading")
    tiled, why = meter.seconds_per_token("prompt_512", 1, rates, cache=False)
    assert why == "multiplying"
    assert tiled == pytest.approx(2 * model.WEIGHTS / 15e12, rel=0.01)
    vectors = meter.Rates(read=40.0, vectors=2000.0, tiles=0.0)
    assert meter.seconds_per_token("prompt_512", 1, vectors, cache=False)[0] == pytest.approx(tiled * 7.5, rel=0.01)
    # a tile takes sixteen rows even for one, so one row is worked by vectors
    assert rates.product_seconds(float, 1) == 1 / 2000e9
    assert rates.product_seconds(float, 17) == 32 / 15_000e9


def test_what_was_promised_is_held_against_what_was_reached(program) -> None:
    report = program("peer_report")
    assert report.goal_text("decode_1.tok_s", 1.4, 0.9) == "≥ 1.3; ≥ 89%"
    assert report.goal_text("decode_1.tok_s", 1.2, 0.8) == "≥ 1.3 missed; ≥ 89% missed"
    assert report.goal_text("serve_16.tok_s", 1.2, None) == "≥ 1.3 missed"
    assert report.goal_text("serve_16.itl_p50_ms", 1.2, None) == ""


def test_a_bend_tells_linear_growth_from_worse(program) -> None:
    sizes, bend = (256, 512, 1024, 2048, 4096, 8192, 16_000), program("growth").bend
    assert bend({size: 7.0 + 0.001 * size for size in sizes}) == pytest.approx(1.0)
    assert bend({size: 7.0 for size in sizes}) == pytest.approx(1.0)
    assert bend({size: 7.0 + 1e-6 * size**2 for size in sizes}) > 1.6
    assert bend({size: 7.0 + size**0.5 for size in sizes}) < 1.0


def test_growth_is_judged_by_the_median_of_rounds(program) -> None:
    growth = program("growth")
    rows = growth.in_turn((1, 2, 4), lambda size, index: {"ms": size * (10.0 if (size, index) == (4, 1) else 1.0)})
    assert rows[4]["ms"] == [4.0, 40.0, 4.0, 4.0, 4.0]
    costs = growth.by_round(rows, "ms")
    assert costs[0] == {1: 1.0, 2: 2.0, 4: 4.0}
    assert sorted(growth.bend(round_) for round_ in costs)[2] == pytest.approx(1.0)


@pytest.mark.parametrize("output", [1_000_000, 16])
def test_the_scheduler_is_measured_with_a_full_batch_and_a_queue(program, output: int) -> None:
    row = program("scheduler_alone").measure(running=4, waiting=20, cached=50, output=output, steps=20)
    assert 0 < row["median_ms"] <= row["p99_ms"] <= row["max_ms"]


def test_chats_find_their_own_past_and_the_shared_beginning(program) -> None:
    chats = program("prefix_chat")

    def engine(*, prefix_cache: bool):
        runner = FakeRunner(make_info(256))
        scheduler = make_scheduler(runner.info, max_num_batched_tokens=512, prefix_cache=prefix_cache)
        return chats.Engine(EngineCore(scheduler, runner, time.monotonic))

    cached, cold = engine(prefix_cache=True), engine(prefix_cache=False)
    chats.chat([cached, cold], users=2, turns=3, vocab=1000)
    out = chats.figures(cached, cold)
    assert out["same_tokens"]
    assert cached.turns[0][0].cached == 0  # nobody was there before
    assert cached.turns[0][1].cached == 1000 // 64 * 64  # the second user finds the system prompt
    assert cached.turns[2][0].cached >= cached.turns[1][0].prompt // 64 * 64
    assert [turn.cached for turns in cold.turns for turn in turns] == [0] * 6
    assert out["saved"] == pytest.approx(out["found_in_cache"] / out["prompt_tokens"])
    cached.turns[1][1].token_ids[5] += 1
    assert not chats.figures(cached, cold)["same_tokens"]
