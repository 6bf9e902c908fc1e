"""`octavo bench` against a small server: dialects, token counts, load shapes, failures, refusals."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from bench.fake_server import FakeServer
from octavo.cli.main import main


def bench(*flags: str, url: str | None = None) -> int:
    target = [url] if url else []
    return main(["bench", *target, "--input-len", "12", "--output-len", "6", "--no-progress", *flags])


def measured(path: Path, server: FakeServer, *flags: str, code: int = 0) -> dict:
    """The JSON of a run that ends with `code`."""
    assert bench("--json", str(path / "out.json"), *flags, url=server.url) == code
    return json.loads((path / "out.json").read_text())


@pytest.mark.parametrize("api", ["completions", "chat"])
@pytest.mark.parametrize("one_write", [False, True])
def test_openai_streams_are_counted_by_usage(tmp_path: Path, api: str, one_write: bool) -> None:
    with FakeServer(one_write=one_write) as server:
        out = measured(tmp_path, server, "--api", api, "--num-requests", "8", "--concurrency", "3")
    assert (out["completed"], out["failed"]) == (8, 0)
    assert out["tokens_counted_by"] == {"usage": 8}
    assert (out["input_tokens"], out["output_tokens"]) == (8 * 12, 8 * 6)
    assert out["tokens_per_message"] == pytest.approx(1.0)
    assert out["model"] == "small"
    assert all(out[name]["p50_ms"] >= 0 for name in ("ttft", "itl", "tpot", "e2e"))
    asked = server.bodies[-1]
    assert asked["stream"] is True
    assert asked["ignore_eos"] is True
    assert asked["stream_options"] == {"include_usage": True}
    assert ("messages" in asked) == (api == "chat")


def test_native_streams_are_counted_by_usage_and_by_ids(tmp_path: Path) -> None:
    with FakeServer() as server:
        out = measured(tmp_path, server, "--api", "native", "--num-requests", "4")
    assert out["output_tokens"] == 4 * 7  # the server's usage counts the end token too
    assert out["input_tokens"] == 4 * 5
    assert len(server.bodies[-1]["input_ids"]) == 12


def test_without_usage_tokens_are_counted_by_chunks_and_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer(usage=False) as server:
        out = measured(tmp_path, server, "--num-requests", "5")
    assert out["tokens_counted_by"] == {"chunks": 5}
    assert out["output_tokens"] == 5 * 6
    assert "counted by chunks" in capsys.readouterr().out


def test_concurrency_is_kept_and_connections_are_used_again(tmp_path: Path) -> None:
    with FakeServer(delay=0.005) as server:
        out = measured(tmp_path, server, "--num-requests", "12", "--concurrency", "4", "--warmup", "0")
    assert out["most_at_once"] == 4
    assert server.most_at_once == 4
    assert server.num_connections <= 5
    assert len(server.bodies) == 12 + 1  # the first one looks whether all is well
    assert out["itl"]["p50_ms"] > 3


def test_rate_sends_when_due_however_slow_the_server(tmp_path: Path) -> None:
    flags = ("--num-requests", "30", "--request-rate", "200", "--warmup", "0", "--details")
    with FakeServer(delay=0.02) as server:
        out = measured(tmp_path, server, *flags)
    due = [row["due"] for row in out["rows"]]
    assert due == sorted(due)
    assert due[-1] == pytest.approx(29 / 200, rel=0.6)
    assert out["most_at_once"] > 10
    assert out["sent_late"]["p50_ms"] < 50
    assert all(len(row["arrivals"]) == 6 for row in out["rows"])


def test_every_failure_is_counted_by_kind_and_makes_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faults = {2: "429", 4: "429", 5: "drop", 7: "cut", 9: "error"}  # request 0 looks whether all is well
    with FakeServer(faults=faults) as server:
        flags = ("--num-requests", "12", "--concurrency", "1", "--warmup", "0")
        out = measured(tmp_path, server, *flags, code=1)
    assert (out["completed"], out["failed"]) == (7, 5)
    assert {kind: entry["count"] for kind, entry in out["errors"].items()} == {
        "HTTP 429": 2,
        "connection lost": 1,
        "cut short": 1,
        "error in the stream": 1,
    }
    assert out["errors"]["error in the stream"]["first"] == "out of memory"
    assert "5 of 12 requests failed" in capsys.readouterr().out


def test_native_error_line_is_a_failure(tmp_path: Path) -> None:
    with FakeServer(faults={1: "error"}) as server:
        out = measured(tmp_path, server, "--api", "native", "--num-requests", "2", "--warmup", "0", code=1)
    assert out["errors"] == {"error 503 in the stream": {"count": 1, "first": "the engine is down"}}


def test_a_request_that_does_not_end_in_time_is_a_timeout(tmp_path: Path) -> None:
    with FakeServer(delay=0.02) as server:
        flags = ("--num-requests", "2", "--output-len", "40", "--timeout", "0.3", "--warmup", "0")
        out = measured(tmp_path, server, *flags, code=1)
    assert out["errors"]["timeout"]["count"] == 2


def test_what_a_server_refuses_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(refuses=("ignore_eos", "stream_options"), takes_ids=False, usage=False) as server:
        out = measured(tmp_path, server, "--num-requests", "3")
    assert out["failed"] == 0
    assert len(out["notes"]) == 4
    assert isinstance(server.bodies[-1]["prompt"], str)
    assert "does not take ignore_eos" in capsys.readouterr().out


def test_words_that_are_not_one_token_each_are_noted(tmp_path: Path) -> None:
    with FakeServer(tokens_a_word=3) as server:
        out = measured(tmp_path, server, "--api", "chat", "--num-requests", "4")
    assert out["notes"] == ["prompts are words, 3.0 tokens each here: 144 tokens in all, not 48"]
    assert out["input_tokens"] == 144


def failure(capsys: pytest.CaptureFixture[str], *flags: str, url: str | None = None) -> str:
    """The one line of a run that measures nothing."""
    assert bench(*flags, url=url) == 2
    line = capsys.readouterr().err
    assert line.startswith("octavo: error: ")
    assert line.count("\n") == 1
    return line


def test_what_cannot_be_measured_is_one_clear_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with FakeServer(key="secret") as server:
        gone = server.url
        assert "refused the key (401: no such key)" in failure(capsys, "--api-key", "wrong", url=server.url)
        assert bench("--num-requests", "2", "--api-key", "secret", url=server.url) == 0
        capsys.readouterr()
    assert "cannot reach" in failure(capsys, url=gone)
    with FakeServer(models=("small", "large")) as server:
        line = failure(capsys, "--model", "huge", url=server.url)
        assert "'huge'" in line
        assert "it serves small, large" in line
        messages = tmp_path / "chat.jsonl"
        messages.write_text('{"messages": [{"role": "user", "content": "x"}]}\n')
        assert "use --api chat" in failure(capsys, "--dataset", str(messages), url=server.url)
    assert "give the URL of a server, or --engine" in failure(capsys)
    assert "http://host:port" in failure(capsys, url="ftp://x")


def test_a_refusal_that_words_do_not_help_is_told_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer(longest=8) as server:
        line = failure(capsys, url=server.url)
    assert "HTTP 400: the longest prompt is 8; with words for token ids: the longest prompt is 8" in line


def test_a_dataset_is_asked_once_through(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}", "output_len": 2 + i}) + "\n" for i in range(5)))
    with FakeServer() as server:
        out = measured(tmp_path, server, "--dataset", str(path), "--warmup", "0")
    assert out["completed"] == 5
    assert out["output_tokens"] == 2 + 3 + 4 + 5 + 6
    assert {body["prompt"] for body in server.bodies} == {f"prompt {i}" for i in range(5)}


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")
def test_a_picture_is_drawn(tmp_path: Path) -> None:
    with FakeServer() as server:
        assert bench("--num-requests", "4", "--png", str(tmp_path / "out.png"), url=server.url) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so_and_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with FakeServer() as server:
        assert bench("--num-requests", "4", "--png", str(tmp_path / "out.png"), url=server.url) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
