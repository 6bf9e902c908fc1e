"""The calls that push-mode users have today work as written; only the port is put in."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess

import pytest

from server.conftest import Server

pytestmark = pytest.mark.server

HTTP_SNIPPET = """
import uuid
import json
import requests

push_mode_http_port = "9965"    # 服务配置的PUSH_MODE_HTTP_PORT
url = f"http://127.0.0.1:{push_mode_http_port}/v1/chat/completions"
req_id = str(uuid.uuid1())
data_single = {
    "text": "Hello, how are you?",
    "req_id": req_id,
    "max_dec_len": 64,
    "stream": True,
  }
# 逐token返回
res = requests.post(url, json=data_single, stream=True)
for line in res.iter_lines():
    print(json.loads(line))

# 多轮对话
data_multi = {
    "messages": [
      {"role": "user", "content": "Hello, who are you"},
      {"role": "system", "content": "I'm a helpful AI assistant."},
      {"role": "user", "content": "List 3 countries and their capitals."},
    ],
    "req_id": req_id,
    "max_dec_len": 64,
    "stream": True,
  }
# 逐token返回
res = requests.post(url, json=data_multi, stream=True)
for line in res.iter_lines():
    print(json.loads(line))
"""

OPENAI_SNIPPET = """
import openai

push_mode_http_port = "9965"    # 服务配置的PUSH_MODE_HTTP_PORT
client = openai.Client(base_url=f"http://127.0.0.1:{push_mode_http_port}/v1/chat/completions", api_key="EMPTY_API_KEY")

# 非流式返回
response = client.completions.create(
    model="default",
    prompt="Hello, how are you?",
  max_tokens=50,
  stream=False,
)

print(response)
print("\\n")

# 流式返回
response = client.completions.create(
    model="default",
    prompt="Hello, how are you?",
  max_tokens=100,
  stream=True,
)

for chunk in response:
  if chunk.choices[0] is not None:
    print(chunk.choices[0].text, end='')
print("\\n")

# Chat completion
# 非流式返回
response = client.chat.completions.create(
    model="default",
    messages=[
        {"role": "user", "content": "Hello, who are you"},
        {"role": "system", "content": "I'm a helpful AI assistant."},
        {"role": "user", "content": "List 3 countries and their capitals."},
    ],
    temperature=0,
    max_tokens=64,
    stream=False,
)

print(response)
print("\\n")

# 流式返回
response = client.chat.completions.create(
    model="default",
    messages=[
        {"role": "user", "content": "Hello, who are you"},
        {"role": "system", "content": "I'm a helpful AI assistant."},
        {"role": "user", "content": "List 3 countries and their capitals."},
    ],
    temperature=0,
    max_tokens=64,
    stream=True,
)

for chunk in response:
  if chunk.choices[0].delta is not None:
    print(chunk.choices[0].delta.content, end='')
print("\\n")
"""


def run_snippet(code: str, server: Server, names: dict[str, object]) -> str:
    """What the snippet prints; its own variables are left in `names`."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("9965", str(server.port("PUSH_MODE_HTTP_PORT"))), names)
    return printed.getvalue()


def test_the_first_curl(server: Server) -> None:
    command = [
        "curl",
        "-sS",
        f"127.0.0.1:{server.port('PUSH_MODE_HTTP_PORT')}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        '{"text": "hello, llm"}',
    ]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert answer["error_msg"] == ""
    assert answer["error_code"] == 0
    assert answer["tokens_all"] == answer["result"]
    assert len(answer["tokens_all"]) > 3


def test_the_http_snippet(server: Server) -> None:
    printed = run_snippet(HTTP_SNIPPET, server, {})
    lines = [eval(line, {"__builtins__": {}}) for line in printed.splitlines()]
    ends = [index for index, line in enumerate(lines) if line["is_end"] == 1]
    assert len(ends) == 2
    assert ends[-1] == len(lines) - 1
    for answer in (lines[: ends[0] + 1], lines[ends[0] + 1 :]):
        assert [line["send_idx"] for line in answer] == list(range(len(answer)))
        assert "".join(line["token"] for line in answer) == answer[-1]["tokens_all"]
        assert len({line["req_id"] for line in answer}) == 1
        assert all(line["error_msg"] == "" and line["error_code"] == 0 for line in answer)


def test_the_openai_snippet(server: Server) -> None:
    printed = run_snippet(OPENAI_SNIPPET, server, {})
    assert "Completion(" in printed
    assert "ChatCompletion(" in printed
    assert "finish_reason='stop'" in printed


def test_the_health_routes(server: Server) -> None:
    for route in ("live", "ready"):
        command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"{server.health}/v2/health/{route}"]
        assert subprocess.run(command, capture_output=True, check=True, timeout=10).stdout == b"200"
