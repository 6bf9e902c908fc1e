"""What depends on how a server was started: limits, keys, other names, no streaming, no gateway, a full queue."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.conftest import REPOSITORY, Server, make_server
from server.contract_calls import (
    CHAT,
    COMPLETIONS,
    STORY,
    ask,
    check_native_stream,
    events,
    joined,
    native_error,
    openai_error,
    post,
    stream,
    tokens_of,
    triton,
)

pytestmark = pytest.mark.server

MESSAGES = [{"role": "user", "content": STORY}]
LONG = {"max_dec_len": 3000, "min_dec_len": 3000}
ALIASES = {
    "HTTP_PORT": "HEALTH_HTTP_PORT",
    "GRPC_PORT": "SERVICE_GRPC_PORT",
    "METRICS_PORT": "METRICS_HTTP_PORT",
    "INFER_QUEUE_PORT": "INTER_PROC_PORT",
    "PUSH_MODE_HTTP_PORT": "SERVICE_HTTP_PORT",
}


@contextlib.contextmanager
def running(run_dir: Path, *, aliases: bool = False, **variables: str) -> Iterator[Server]:
    """A started server; with `aliases` its ports are given by their other names alone."""
    one = make_server(run_dir, **variables)
    started_as = one
    if aliases:
        environ = {ALIASES.get(name, name): value for name, value in one.environ.items()}
        started_as = Server(environ, run_dir)
    started = started_as.script("start_server.sh")
    assert started.returncode == 0, started.stdout + started.stderr
    yield one
    stopped = started_as.script("stop_server.sh")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One sequence at a time, one waiting, and a context of 4096 tokens by a config.json elsewhere; ports by alias."""
    folder = tmp_path_factory.mktemp("config")
    config = json.loads((REPOSITORY / "demo" / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    with running(
        tmp_path_factory.mktemp("tight"),
        aliases=True,
        BATCH_SIZE="1",
        MAX_CACHED_TASK_NUM="1",
        MAX_DEC_LEN="4000",
        FD_MODEL_CONFIG_PATH=str(folder / "config.json"),
    ) as one:
        yield one


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Keys, one strict name, small bodies, two gateway workers."""
    with running(
        tmp_path_factory.mktemp("keyed"),
        API_KEYS="first-key,second-key",
        STRICT_MODEL="1",
        SERVED_MODEL_NAME="right",
        MAX_BODY_BYTES="20000",
        PUSH_MODE_HTTP_WORKERS="2",
    ) as one:
        yield one


@pytest.fixture(scope="module")
def whole_only(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("whole"), DISABLE_STREAMING="1", MAX_DEC_LEN="100") as one:
        yield one


# ---- limits of length


def test_the_default_length_is_what_the_context_leaves(tight: Server) -> None:
    ids = tokens_of(tight, "猫") * 4090
    answer = ask(tight, input_ids=ids, return_usage=True, temperature=0, ignore_eos=True)
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4096 - len(ids)
    openai = ask(tight, COMPLETIONS, model="m", prompt=ids, max_tokens=500, temperature=0, ignore_eos=True)
    assert openai["usage"]["completion_tokens"] == 4096 - len(ids)


def test_a_max_seq_len_above_the_context_is_lowered_with_a_warning(tight: Server) -> None:
    logs = [path.read_text(errors="replace") for path in tight.run_dir.rglob("*.log")]
    assert any("MAX_SEQ_LEN" in line and "8192" in line and "4096" in line for log in logs for line in log.splitlines())


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_dec_len": 4001}, "max_dec_len (4001) exceeds MAX_DEC_LEN (4000)"),
        ({"min_dec_len": 4001}, "min_dec_len (4001) exceeds MAX_DEC_LEN (4000)"),
        ({"seq_len": 4001}, "(4001) exceeds MAX_DEC_LEN (4000)"),
        ({"input_ids": [9] * 97, "max_dec_len": 4000}, "4096"),
        ({"input_ids": [9] * 4096}, "4096"),
        ({"input_ids": [9] * 4097}, "MAX_SEQ_LEN (4096)"),
    ],
)
def test_what_is_too_long_is_refused_and_never_cut(tight: Server, body: dict[str, Any], words: str) -> None:
    given = {} if "input_ids" in body else {"text": STORY}
    assert words in native_error(post(tight, {**given, **body}), 400)
    assert words in native_error(post(tight, {**given, **body, "stream": True}), 400)


def test_the_openai_dialect_calls_it_context_length_exceeded(tight: Server) -> None:
    error = openai_error(post(tight, {"model": "m", "prompt": [9] * 4096}, COMPLETIONS), 400)
    assert error["code"] == "context_length_exceeded"


# ---- the queue


@contextlib.contextmanager
def busy(server: Server, *names: str) -> Iterator[None]:
    """Long requests under these names, the first one running, the others queued."""
    threads = []
    for count, name in enumerate(names, 1):
        body = {"text": STORY, "req_id": name, "stream": True, **LONG}
        threads.append(threading.Thread(target=post, args=(server, body)))
        threads[-1].start()
        wait_for(server, lambda count=count: in_flight(server) >= count)
    yield
    for name in names:
        ask(server, "/v1/abort", req_id=name)
    for thread in threads:
        thread.join(20)
    wait_for(server, lambda: in_flight(server) == 0)


def in_flight(server: Server) -> int:
    (info,) = triton(server, {"op": "info"})
    return info["frontend"]["running"] + info["frontend"]["waiting"]


def wait_for(server: Server, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_queue_refuses_at_once(tight: Server) -> None:
    with busy(tight, "runs", "waits"):
        for extra in ({}, {"stream": True}):
            start = time.monotonic()
            answer = post(tight, {"text": "x", **extra})
            assert "MAX_CACHED_TASK_NUM" in native_error(answer, 429)
            assert int(answer.headers["retry-after"]) > 0
            assert time.monotonic() - start < 1
            openai = post(tight, {"model": "m", "messages": MESSAGES, **extra})
            assert openai_error(openai, 429)["type"] == "rate_limit_error"
            assert int(openai.headers["retry-after"]) > 0
        (error,) = triton(tight, {"req_id": "g", "text": "x"})
        assert error["error_code"] == 429


def test_a_resume_from_outside_does_not_skip_the_queue(tight: Server) -> None:
    with busy(tight, "runs", "waits"):
        body = {"text": STORY, "req_id": "new", "generated_token_ids": [9], "send_idx": 1, "attempt": 3}
        native_error(post(tight, body), 429)
        native_error(post(tight, {**body, "stream": True}), 429)
        native_error(post(tight, {**body, "resume_inside": True}), 400)


def test_the_timeout_counts_the_wait_in_the_queue(tight: Server) -> None:
    with busy(tight, "runs"):
        for extra in ({}, {"stream": True}):
            start = time.monotonic()
            answer = post(tight, {"text": STORY, "timeout": 0.3, **extra})
            native_error(answer, 408)
            assert answer.headers["x-should-retry"] == "false"
            assert 0.25 < time.monotonic() - start < 2


def test_one_who_waits_can_be_aborted_and_leaves_the_place(tight: Server) -> None:
    with busy(tight, "runs"):
        thread = threading.Thread(target=post, args=(tight, {"text": STORY, "req_id": "w"}))
        thread.start()
        wait_for(tight, lambda: in_flight(tight) == 2)
        assert ask(tight, "/v1/abort", req_id="w")["aborted"] is True
        thread.join(5)
        assert not thread.is_alive()
        wait_for(tight, lambda: in_flight(tight) == 1)


def test_drain_closes_admission_with_503(tight: Server) -> None:
    """The last test of this server: nothing opens it again."""
    triton(tight, {"op": "drain"})
    for body in ({"text": "x"}, {"text": "x", "stream": True}, {"text": "x", "attempt": 2, "generated_token_ids": [9]}):
        start = time.monotonic()
        answer = post(tight, body)
        native_error(answer, 503)
        assert int(answer.headers["retry-after"]) > 0
        assert time.monotonic() - start < 2
    openai_error(post(tight, {"model": "m", "messages": MESSAGES}), 503)
    time.sleep(0.3)
    assert httpx.get(f"{tight.gateway}/health", timeout=5).status_code == 503
    wait_for(tight, lambda: httpx.get(f"{tight.health}/v2/health/ready", timeout=5).status_code == 503)
    assert httpx.get(f"{tight.health}/v2/health/live", timeout=5).status_code == 200


# ---- keys, names, body sizes


def with_key(server: Server, key: str, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
    return post(server, body, path, authorization=f"Bearer {key}")


ROUTES = [
    ("POST", CHAT),
    ("POST", COMPLETIONS),
    ("POST", "/v1/chat/completions/completions"),
    ("POST", "/v1/chat/completions/chat/completions"),
    ("POST", "/v1/abort"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/right"),
    ("GET", "/v1/chat/completions/models"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_asks_for_a_key(keyed: Server, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer first-key,second-key"}):
        answer = httpx.request(method, f"{keyed.gateway}{path}", headers=headers, timeout=10)
        assert answer.status_code == 401
        body = answer.json()
        assert "error" in body or body["error_code"] == 401
        assert "first" not in answer.text
    with_right = httpx.request(
        method, f"{keyed.gateway}{path}", headers={"authorization": "Bearer second-key"}, timeout=10
    )
    assert with_right.status_code != 401


def test_health_is_open(keyed: Server) -> None:
    assert httpx.get(f"{keyed.gateway}/health", timeout=10).status_code == 200
    assert httpx.get(f"{keyed.health}/v2/health/ready", timeout=10).status_code == 200


def test_an_unauthorised_body_is_refused_in_both_shapes(keyed: Server) -> None:
    openai_error(post(keyed, {"model": "right", "messages": MESSAGES}, "/v1/chat/completions/chat/completions"), 401)
    answer = post(keyed, {"text": "x"})
    assert native_error(answer, 401)
    assert answer.headers["www-authenticate"]


def test_a_strict_server_has_one_name(keyed: Server) -> None:
    good = with_key(keyed, "first-key", {"model": "right", "messages": MESSAGES, "max_tokens": 1})
    assert good.json()["model"] == "right"
    bad = with_key(keyed, "first-key", {"model": "wrong", "messages": MESSAGES, "max_tokens": 1})
    error = openai_error(bad, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    native = with_key(keyed, "first-key", {"model": "wrong", "text": STORY, "max_tokens": 1})
    native_error(native, 404)
    assert with_key(keyed, "first-key", {"text": STORY, "max_dec_len": 1}).status_code == 200
    listed = httpx.get(f"{keyed.gateway}/v1/models", headers={"authorization": "Bearer first-key"}, timeout=10).json()
    assert [model["id"] for model in listed["data"]] == ["right"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/chat/completions/completions", "/tokenize"])
def test_a_body_over_max_body_bytes_is_413(keyed: Server, path: str) -> None:
    answer = with_key(keyed, "first-key", {"prompt": "x" * 20_000}, path)
    assert answer.status_code == 413
    assert "20000" in answer.text
    assert "MAX_BODY_BYTES" in answer.text


def test_only_the_same_key_supersedes_or_aborts(keyed: Server) -> None:
    body = {"text": STORY, "req_id": "mine", "stream": True, "max_dec_len": 1024, "min_dec_len": 1024}
    later = {"text": STORY, "req_id": "mine", "attempt": 1, "max_dec_len": 1}
    url, headers = f"{keyed.gateway}{CHAT}", {"authorization": "Bearer first-key"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()  # kept: dropping it would close the stream
        next(lines)
        native_error(with_key(keyed, "second-key", later), 409)
        assert with_key(keyed, "second-key", {"req_id": "mine"}, "/v1/abort").json()["aborted"] is False
        assert with_key(keyed, "first-key", later).status_code == 200
        assert json.loads([line for line in lines][-1])["error_code"] == 409


def test_workers_share_ids_in_flight_and_aborts(keyed: Server) -> None:
    body = {"text": STORY, "req_id": "shared", "stream": True, "max_dec_len": 1024, "min_dec_len": 1024}
    url, headers = f"{keyed.gateway}{CHAT}", {"authorization": "Bearer first-key"}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        for _ in range(6):  # new connections: some reach the other worker
            native_error(with_key(keyed, "first-key", {"text": "x", "req_id": "shared"}), 409)
        assert with_key(keyed, "first-key", {"req_id": "shared"}, "/v1/abort").json()["aborted"] is True
        assert json.loads([line for line in lines][-1])["finish_reason"] == "cancelled"


# ---- only whole answers


def test_without_streaming_only_the_last_message_is_sent(whole_only: Server) -> None:
    body = {"text": STORY, "temperature": 0, "max_dec_len": 20}
    (line,) = stream(whole_only, **body)
    ((message,),) = triton(whole_only, {"req_id": "g", **body})
    for one in (line, message):
        last = check_native_stream([one])
        assert (last["send_idx"], last["tokens_all_num"], len(joined([one])[1])) == (0, 20, 20)
        assert last["token"] == last["tokens_all"]
    assert ask(whole_only, **body)["tokens_all"] == message["tokens_all"]


def test_without_streaming_openai_streams_still_have_their_shape(whole_only: Server) -> None:
    chunks = events(whole_only, messages=MESSAGES, temperature=0, max_tokens=9)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_without_streaming_a_resume_runs_from_its_start(whole_only: Server) -> None:
    body = {"text": STORY, "temperature": 1.5, "infer_seed": 3, "max_dec_len": 20}
    (first,) = stream(whole_only, **body)
    (again,) = stream(whole_only, **body, generated_token_ids=first["token_ids"][:5], send_idx=0, attempt=1)
    for name in ("token", "token_ids", "tokens_all", "send_idx", "usage"):
        assert again[name] == first[name]


def test_without_streaming_choices_come_once_each(whole_only: Server) -> None:
    answer = [item[0] for item in triton(whole_only, {"req_id": "n", "text": STORY, "n": 3, "max_dec_len": 5})]
    assert sorted(item["index"] for item in answer) == [0, 1, 2]
    assert all(item["is_end"] == 1 for item in answer)


# ---- gRPC alone


def test_a_gateway_port_of_minus_one_leaves_grpc(tmp_path: Path) -> None:
    with running(tmp_path, PUSH_MODE_HTTP_PORT="-1") as one:
        assert triton(one, {"req_id": "g", "text": STORY, "max_dec_len": 3})[-1][0]["tokens_all_num"] == 3
        assert httpx.get(f"{one.health}/v2/health/live", timeout=5).status_code == 200
        names = [process["name"] for process in httpx.get(f"{one.health}/v2/health", timeout=5).json()["processes"]]
        assert not any(name.startswith("gateway") for name in names)
