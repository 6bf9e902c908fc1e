"""The calls that users were shown, as they were written, ports and names aside."""

from __future__ import annotations

import json
import subprocess
import uuid

import openai
import pytest
import requests

from gateway.conftest import Stack
from gateway.fake_triton import WORDS

TEXT = "".join(WORDS)
CONVERSATION = [
    {"role": "user", "content": "Hello, who are you"},
    {"role": "system", "content": "I'm a helpful AI assistant."},
    {"role": "user", "content": "List 3 countries and their capitals."},
]


def test_requests_with_lines(stack: Stack) -> None:
    url = f"{stack.url}/v1/chat/completions"
    req_id = str(uuid.uuid1())
    data_single = {"text": "Hello, how are you?", "req_id": req_id, "max_dec_len": 64, "stream": True}
    data_multi = {"messages": CONVERSATION, "req_id": req_id, "max_dec_len": 64, "stream": True}
    for data in (data_single, data_multi):
        res = requests.post(url, json=data, stream=True, timeout=10)
        said = [json.loads(line) for line in res.iter_lines()]
        assert "".join(one["token"] for one in said) == TEXT
        assert {one["req_id"] for one in said} == {req_id}
        assert all(one["error_msg"] == "" and one["error_code"] == 0 for one in said)
        assert said[-1]["is_end"] == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1"])
def test_openai_client(stack: Stack, path: str) -> None:
    client = openai.Client(base_url=stack.url + path, api_key="EMPTY_API_KEY")
    response = client.completions.create(model="default", prompt="Hello, how are you?", max_tokens=50, stream=False)
    assert response.choices[0].text == TEXT
    response = client.completions.create(model="default", prompt="Hello, how are you?", max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].text for chunk in response if chunk.choices[0] is not None) == TEXT
    response = client.chat.completions.create(
        model="default", messages=CONVERSATION, temperature=0, max_tokens=64, stream=False
    )
    assert response.choices[0].message.content == TEXT
    response = client.chat.completions.create(
        model="default", messages=CONVERSATION, temperature=0, max_tokens=64, stream=True
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in response if chunk.choices[0].delta is not None)
        == TEXT
    )
    assert client.models.list().data[0].id == "tiny"


def test_module_level_openai_client(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "api_key", "EMPTY")
    monkeypatch.setattr(openai, "base_url", f"{stack.url}/v1/")
    monkeypatch.setattr(openai, "_client", None, raising=False)
    completion = openai.completions.create(model="vicuna-7b-v1.5", prompt="Once upon a time", max_tokens=64)
    assert completion.choices[0].text == TEXT
    messages = [{"role": "user", "content": "Hello! What is your name?"}]
    completion = openai.chat.completions.create(model="vicuna-7b-v1.5", messages=messages)
    assert completion.choices[0].message.content == TEXT


async def test_async_openai_client_pages_models(stack: Stack) -> None:
    client = openai.AsyncOpenAI(api_key="YOUR_API_KEY", base_url=f"{stack.url}/v1")
    model_cards = await client.models.list()._get_page()
    response = await client.chat.completions.create(
        model=model_cards.data[0].id, messages=CONVERSATION[1:], temperature=0.8, top_p=0.8
    )
    assert response.choices[0].message.content == TEXT
    await client.close()


@pytest.mark.parametrize(
    ("path", "data", "key"),
    [
        ("/v1/chat/completions", '{"text": "hello, llm"}', "result"),
        ("/v1/chat/completions", '{"model": "q", "messages": [{"role": "user", "content": "Hi"}]}', "choices"),
        ("/v1/completions", '{\n"model": "llama",\n"prompt": "two steps to build a house:"\n}', "choices"),
        (
            "/v1/completions",
            '{"model": "q", "prompt": "浙江 -> 杭州\\n四川 ->", "max_tokens": 32, "temperature": 0.1, "seed": 42}',
            "choices",
        ),
    ],
)
@pytest.mark.parametrize("header", [True, False])
def test_curl(stack: Stack, path: str, data: str, key: str, header: bool) -> None:
    headers = ["-H", "Content-Type: application/json"] if header else []
    command = ["curl", "-s", stack.url + path, *headers, "-d", data]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=10).stdout)
    assert key in answer
