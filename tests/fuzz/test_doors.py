"""Keys, TLS, what listens where, what is written to logs, and that nothing unpickles."""

from __future__ import annotations

import ast
import hmac
import json
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import requests

from gateway.conftest import Stack, running
from gateway.test_worker import environ
from octavo.gateway.edge import OPEN_PATHS, Edge
from octavo.node.errors import NodeError
from octavo.node.tls import check_tls
from octavo.protocol.errors import Unauthorized
from octavo.settings import Settings, SettingsError
from server.conftest import REPOSITORY, Server, make_server

MARKER = "XyzzyMarker"
KEYS = ("sk-first-key-0001", "sk-second-key-0002")

# ---- pickle

UNPICKLING = {
    "send_pyobj", "recv_pyobj",  # zmq
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",  # torch.distributed
    "Unpickler", "loads_pickle", "read_pickle", "unsafe_load", "full_load",
}  # fmt: skip
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}


def unpickling(source: str) -> list[str]:
    """Everything in a source text that could run code out of data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, (ast.Attribute, ast.Name)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            found += [name] if name in UNPICKLING else []
            found += (
                ["torch.load"] if ast.unparse(node) in ("torch.load", "torch.jit.load", "np.load", "numpy.load") else []
            )
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            found += [] if isinstance(node.value, ast.Constant) and node.value.value is False else [node.arg]
    return found


def sources() -> list[Path]:
    roots = ("serving", "client", "model_repository", "demo", "benchmarks")
    return [path for root in roots for path in sorted((REPOSITORY / root).rglob("*.py"))]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_unpickles(path: Path) -> None:
    assert unpickling(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "sock.recv_pyobj()", "torch.load('x')", "read(allow_pickle=True)",
     "dist.broadcast_object_list(x)", "from_pretrained(p, trust_remote_code=flag)"],
)  # fmt: skip
def test_unpickling_is_found(source: str) -> None:
    assert unpickling(source)


# ---- keys


@pytest.fixture(scope="module")
def locked() -> Iterator[Stack]:
    with running(API_KEYS=",".join(KEYS)) as stack:
        yield stack


def routes(stack: Stack) -> list[tuple[str, str]]:
    document = requests.get(f"{stack.url}/openapi.json", headers=auth(KEYS[0]), timeout=10).json()
    return [(method, path) for path, methods in document["paths"].items() for method in methods]


def auth(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_the_open_ones_asks_for_a_key(locked: Stack) -> None:
    asked = routes(locked)
    assert len(asked) > 6
    for method, path in [*asked, ("get", "/openapi.json"), ("get", "/docs"), ("get", "/nowhere"), ("post", "/v1/x")]:
        answer = requests.request(method, locked.url + path.replace("{name}", "x"), timeout=10)
        assert (answer.status_code == 401) is (path not in OPEN_PATHS), (method, path, answer.status_code)


@pytest.mark.parametrize(
    "headers",
    [auth(""), auth("sk-first-key-000"), auth(KEYS[0] + "x"), auth(KEYS[0].upper()), auth(",".join(KEYS)), auth("é"),
     {"authorization": KEYS[0]}, {"authorization": f"Basic {KEYS[0]}"}, {"x-api-key": "no"}, {"cookie": KEYS[0]}],
)  # fmt: skip
def test_what_is_no_key_is_401(locked: Stack, headers: dict[str, str]) -> None:
    encoded = {name: value.encode("utf-8") for name, value in headers.items()}
    answer = requests.post(f"{locked.url}/v1/completions", json={"text": "x"}, headers=encoded, timeout=10)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("headers", [auth(KEYS[0]), auth(KEYS[1]), {"x-api-key": KEYS[1]}])
def test_every_key_opens(locked: Stack, headers: dict[str, str]) -> None:
    answer = requests.post(f"{locked.url}/v1/completions", json={"text": "x"}, headers=headers, timeout=10)
    assert answer.status_code == 200


@pytest.mark.parametrize("key", [KEYS[0], KEYS[1], KEYS[0][:-1], "", "x" * 4000, "ключ"])
def test_every_key_is_compared_by_digests_whether_one_matches_or_not(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """So how long it takes says nothing about how much of a key is right, nor which one it is."""
    seen: list[tuple[int, int]] = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (seen.append((len(a), len(b))), compare(a, b))[1])
    edge = Edge(lambda *_: None, api_keys=KEYS, new_id=lambda: "id")  # type: ignore[arg-type,return-value]
    headers = {"authorization": f"Bearer {key}".encode().decode("latin-1")}
    try:
        assert edge._name_of_key(headers)
        assert key in KEYS
    except Unauthorized:
        assert key not in KEYS
    assert seen == [(32, 32)] * 2 * len(KEYS), "each of the two headers against each key"


# ---- what other servers fell over


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("guided_json", {"type": "object"}),
        ("guided_regex", "(a*)*b"),
        ("guided_grammar", "root ::= root root"),
        ("guided_choice", ["a"] * 100),
        ("structured_outputs", {"regex": "(x+x+)+y"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("chat_template", "{{ ''.__class__ }}"),
        ("logits_processors", ["os.system"]),
        ("prompt_embeds", "gASVAAAA"),
        ("tools", [{"type": "function", "function": {"name": "x"}}]),
    ],
)
def test_what_could_run_or_blow_up_is_refused_by_name(locked: Stack, name: str, value: object) -> None:
    """Grammars that explode, templates and pickled tensors from a request, processors named by a path."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], name: value}
    answer = requests.post(f"{locked.url}/v1/chat/completions", json=body, headers=auth(KEYS[0]), timeout=10)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), answer.text


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "file:///etc/passwd", "data:image/png;base64,AAAA"])
def test_no_address_of_a_request_is_ever_opened(locked: Stack, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "m", "messages": [{"role": "user", "content": content}]}
    answer = requests.post(f"{locked.url}/v1/chat/completions", json=body, headers=auth(KEYS[0]), timeout=10)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0].content[0].type")


def test_words_of_the_inner_wire_cannot_be_smuggled_in(locked: Stack) -> None:
    """An op, another's key, a resumption that skips the queue, an order to a carrier."""
    for name, value in (("op", "drain"), ("key", "x"), ("owner", "node"), ("resume_inside", True), ("raw_text", True)):
        body = {"text": "x", name: value}
        answer = requests.post(f"{locked.url}/v1/completions", json=body, headers=auth(KEYS[0]), timeout=10)
        assert (answer.status_code, answer.json()["error_field"]) == (400, name)


# ---- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that signs itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return cert, key


@pytest.mark.server
def test_a_server_with_a_certificate_speaks_https_and_nothing_else(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    server = make_server(tmp_path, TLS_CERTFILE=str(cert), TLS_KEYFILE=str(key))
    started = server.script("start_server.sh")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        port = server.port("PUSH_MODE_HTTP_PORT")
        with httpx.Client(verify=ssl.create_default_context(cafile=str(cert)), trust_env=False, timeout=30) as http:
            answer = http.post(f"https://localhost:{port}/v1/completions", json={"text": "x", "max_dec_len": 4})
            assert (answer.status_code, answer.json()["tokens_all_num"]) == (200, 4)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=5, trust_env=False)
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            httpx.get(f"https://127.0.0.1:{port}/health", timeout=5, trust_env=False)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with socket.create_connection(("127.0.0.1", port), timeout=5) as plain, pytest.raises((ssl.SSLError, OSError)):
            old.wrap_socket(plain)
    finally:
        assert server.script("stop_server.sh").returncode == 0


def test_certificate_and_key_come_together_and_fit(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with pytest.raises(SettingsError, match=r"TLS_CERTFILE=.* needs TLS_KEYFILE too"):
        Settings.from_environ({"TLS_CERTFILE": str(cert)})
    with pytest.raises(SettingsError, match="TLS_KEYFILE=/nowhere: is not a file"):
        Settings.from_environ({"TLS_CERTFILE": str(cert), "TLS_KEYFILE": "/nowhere"})
    check_tls(Settings.from_environ({"TLS_CERTFILE": str(cert), "TLS_KEYFILE": str(key)}))
    with pytest.raises(NodeError, match="cannot be used with TLS_KEYFILE"):
        check_tls(Settings.from_environ({"TLS_CERTFILE": str(cert), "TLS_KEYFILE": str(cert)}))


def test_a_worker_with_a_bad_certificate_ends_with_one_line(locked: Stack, certificate: tuple[Path, Path]) -> None:
    env = environ(locked, 1, TLS_CERTFILE=str(certificate[1]), TLS_KEYFILE=str(certificate[1]))
    command = [sys.executable, "-m", "octavo.gateway"]
    env["PUSH_MODE_HTTP_PORT"] = str(free_port())
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("octavo: error: TLS_CERTFILE=")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# ---- a running server


def test_only_the_documented_ports_are_public(open_house: Server) -> None:
    """HOST=0.0.0.0: health, metrics, gRPC and the gateway; all else is on loopback."""
    node = int((open_house.run_dir / "node.pid").read_text())
    listening = {address for pid in [node, *descendants(node)] for address in listeners(pid)}
    public = {port for address, port in listening if address not in ("127.0.0.1", "::1")}
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "PUSH_MODE_HTTP_PORT")
    assert public == {open_house.port(name) for name in names}
    assert ("127.0.0.1", open_house.port("INFER_QUEUE_PORT")) in listening


def descendants(root: int) -> list[int]:
    from chaos.victims import descendants_of

    return descendants_of(root)


def listeners(pid: int) -> set[tuple[str, int]]:
    """(address, port) of the TCP sockets that a process listens on."""
    held = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            held.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in held:
                address, port = words[1].split(":")
                packed = b"".join(bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8))
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


@pytest.fixture(scope="module")
def open_house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on all addresses, with keys."""
    server = make_server(tmp_path_factory.mktemp("doors"), HOST="0.0.0.0", API_KEYS=",".join(KEYS), MAX_DEC_LEN="64")
    started = server.script("start_server.sh")
    assert started.returncode == 0, started.stdout + started.stderr
    yield server
    assert server.script("stop_server.sh").returncode == 0


def test_requests_are_counted_by_key_and_no_key_is_shown(open_house: Server) -> None:
    for key, times in ((KEYS[0], 2), (KEYS[1], 1)):
        for _ in range(times):
            body = {"text": "x", "max_dec_len": 5, "ignore_eos": True}
            url = f"{open_house.gateway}/v1/completions"
            assert requests.post(url, json=body, headers=auth(key), timeout=30).status_code == 200
    page = requests.get(open_house.metrics, timeout=10).text
    counts = [line.split() for line in page.splitlines() if line.startswith("octavo_key_")]
    by_metric = {
        name: float(value) for name, value in counts if "generation_tokens_total" in name and 'key="none"' not in name
    }
    assert sorted(by_metric.values()) == [5.0, 10.0], counts
    assert not any(key in page for key in KEYS)


SECRETS = [
    {"text": MARKER},
    {"messages": [{"role": "user", "content": MARKER}]},
    {"messages": [{"role": MARKER, "content": "x"}]},
    {"text": "x", "stop": [MARKER], "max_dec_len": 3},
    {"text": "x", "system": MARKER, "max_dec_len": 3},
    {"text": "x", "logit_bias": {MARKER: 1}},
    {"text": "x", "response_type": MARKER},
    {"text": "x", "chat_template_kwargs": {"a": MARKER}, "max_dec_len": 3},
    {"text": "x", "topp": MARKER},
    {"text": MARKER, "max_dec_len": 100_000},
    {"model": "m", "prompt": MARKER, "max_tokens": 3},
    {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": MARKER}]}]},
    {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [MARKER]},
    {MARKER: MARKER},
]


def test_nothing_of_a_request_is_in_any_log(open_house: Server) -> None:
    url = f"{open_house.gateway}/v1/chat/completions"
    for body in SECRETS:
        requests.post(url, json=body, headers=auth(KEYS[0]), timeout=30)
    requests.post(url, data=f'{{"text": "{MARKER}'.encode(), headers=auth(KEYS[0]), timeout=30)
    requests.get(f"{url}?q={MARKER}", headers={"cookie": MARKER, "authorization": f"Bearer {MARKER}"}, timeout=30)
    logs = read_logs(open_house)
    assert "refused 400" in logs, "the refusals themselves are there"
    assert MARKER not in logs
    assert not any(key in logs for key in KEYS)


def test_ids_and_paths_cannot_forge_a_log_line(open_house: Server) -> None:
    url = f"{open_house.gateway}/v1/completions"
    forged = "a\r\n2026-01-01 00:00:00 ERROR forged\x1b[31m\u2028\u202e\x00"
    for body in ({"text": "x", "req_id": forged, "max_dec_len": 1}, {"text": "x", "req_id": forged, "topp": 5}):
        requests.post(url, json=body, headers={**auth(KEYS[0]), "x-request-id": "b forged\x7f"}, timeout=30)
    requests.get(f"{open_house.gateway}/x%0d%0aERROR forged%1b[31m%E2%80%AE", headers=auth(KEYS[0]), timeout=30)
    abort = {"req_id": forged}
    requests.post(f"{open_house.gateway}/v1/abort", json=abort, headers=auth(KEYS[0]), timeout=30)
    logs = read_logs(open_house)
    lines = logs.splitlines()  # also at U+2028 and its like
    assert any("forged" in line for line in lines)
    assert not any(line.startswith(("2026-01-01", "ERROR forged")) for line in lines)
    assert not {"\x1b", "\x00", "\x7f", "\u202e", "\u2028"} & set(logs)


def read_logs(server: Server) -> str:
    folder = server.run_dir / "log"
    found = [path.read_text(errors="replace") for path in sorted(folder.glob("*.log*"))]
    assert len(found) >= 4
    return "\n".join(found)


def test_an_error_inside_shows_an_id_and_nothing_else(open_house: Server) -> None:
    """No traceback, no path, no name of shared memory in any refusal."""
    for body in (b"[" * 500_000, b'{"text": "\xff"}', json.dumps({"text": "x", "n": 1 << 70}).encode()):
        answer = requests.post(f"{open_house.gateway}/v1/completions", data=body, headers=auth(KEYS[0]), timeout=30)
        assert answer.status_code == 400
        assert not any(word in answer.text for word in ("Traceback", ".py", "/dev/shm", "octavo_"))
