"""Every block of the README that asks the server something runs as written; only ports and paths are put in."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server.conftest import REPOSITORY, Server

pytestmark = pytest.mark.server

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, re.DOTALL)
SETS_UP = ("start_server.sh", "make test")  # run by other tests and by CI itself
CURLS = [code for language, code in BLOCKS if language == "bash" and not any(word in code for word in SETS_UP)]
PYTHON = [code for language, code in BLOCKS if language == "python"]


def placed(code: str, server: Server) -> str:
    """The block with this server's ports."""
    return code.replace("9965", str(server.port("PUSH_MODE_HTTP_PORT"))).replace("8811", str(server.port("GRPC_PORT")))


def test_the_readme_has_blocks_to_run() -> None:
    assert len(CURLS) >= 2
    assert len(PYTHON) >= 3


@pytest.mark.parametrize("code", CURLS)
def test_a_shell_block_answers(server: Server, code: str) -> None:
    answer = subprocess.run(
        ["bash", "-ec", placed(code, server)], capture_output=True, check=True, timeout=60, text=True
    )
    assert '"tokens_all":"' in answer.stdout
    assert '"error_code":0' in answer.stdout


@pytest.mark.parametrize("code", PYTHON)
def test_a_python_block_prints_an_answer(server: Server, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(placed(code, server), {})
    assert len(printed.getvalue().strip()) > 5


def test_the_terminal_chat_answers_and_remembers(server: Server) -> None:
    lines = "浙江的省会在哪里?\n这有什么好吃的?\n/seed 7\n/help\n/new\n/exit\n"
    command = [str(Path(sys.prefix) / "bin" / "octavo"), "chat", server.gateway, "--temperature", "0", "--plain"]
    chat = subprocess.run(command, input=lines, capture_output=True, check=True, timeout=60, text=True)
    assert "杭州" in chat.stdout
    assert "/undo takes the last turn back" in chat.stdout
    assert chat.stdout.count("tok/s") == 2


def test_one_question_from_the_command_line(server: Server) -> None:
    command = [str(Path(sys.prefix) / "bin" / "octavo"), "chat", f"grpc://{server.grpc}", "--once", "你好!"]
    chat = subprocess.run(command, capture_output=True, check=True, timeout=60, text=True)
    assert "你好" in chat.stdout
