"""Every block of the documentation runs as written; only this server's ports are put in."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
from pathlib import Path

import pytest

from server.conftest import REPOSITORY, Server, make_server
from server.documents import PAGES, Block, blocks, shape, to_run

pytestmark = pytest.mark.server

DEFAULTS = {"9965": "PUSH_MODE_HTTP_PORT", "8811": "GRPC_PORT", "8110": "HTTP_PORT", "8722": "METRICS_PORT"}
SHELL, PYTHON = to_run("bash"), to_run("python")


def placed(code: str, server: Server) -> str:
    """The block with this server's ports."""
    for port, name in DEFAULTS.items():
        code = code.replace(f":{port}", f":{server.port(name)}")
    return code


@pytest.fixture(scope="module")
def spare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for commands that look at a server that is not started."""
    return make_server(tmp_path_factory.mktemp("spare")).environ


def test_the_pages_have_blocks_and_every_block_that_is_not_run_says_why() -> None:
    assert len(SHELL) >= 15
    assert len(PYTHON) >= 5
    for page in PAGES:
        for block in blocks(page):
            assert block.norun is None or len(block.norun) > 10, block.name
            assert block.language not in ("sh", "shell", "py"), f"{block.name}: bash and python are run"


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_a_shell_block_does_what_the_page_says(server: Server, spare: dict[str, str], block: Block) -> None:
    command = ["bash", "-eo", "pipefail", "-c", placed(block.code, server)]
    answer = subprocess.run(command, cwd=REPOSITORY, env=spare, capture_output=True, timeout=90, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() or "-o /dev/null" in block.code or "/v2/health/" in block.code
    code = error_of(answer.stdout)
    assert code == block.error, answer.stdout
    if block.answer is not None:
        assert shape(json.loads(answer.stdout)) == shape(json.loads(block.answer))


def error_of(output: str) -> int | None:
    """The code of an error in either dialect, if the output is one."""
    try:
        body = json.loads(output)
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    if isinstance(body.get("error"), dict):
        return body["error"].get("status") or 400
    return body.get("error_code") or None


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_a_python_block_prints_an_answer(server: Server, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(placed(block.code, server), block.name, "exec"), {})
    assert len(printed.getvalue().strip()) > 5


def test_a_block_that_fails_would_be_noticed(server: Server, spare: dict[str, str], tmp_path: Path) -> None:
    """The three ways: a bad exit, an error in place of an answer, another shape."""
    url = "curl -s 127.0.0.1:9965/tokenize -H 'Content-Type: application/json' -d"
    bad = [
        Block("x", 1, "bash", "", "echo something; exit 3"),
        Block("x", 1, "bash", "", f"{url} '{{}}'"),
        Block("x", 1, "bash", "", f'{url} \'{{"prompt": "x"}}\'', '{"tokens": ["x"]}'),
    ]
    for block in bad:
        with pytest.raises(AssertionError):
            test_a_shell_block_does_what_the_page_says(server, spare, block)
