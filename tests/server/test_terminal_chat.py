"""The terminal chat on a real server: what it answers, remembers and prints. Blocks of pages: test_documents.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.conftest import Server

pytestmark = pytest.mark.server


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
