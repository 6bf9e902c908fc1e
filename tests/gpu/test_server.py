"""The whole server on a card, through gateway and Triton, where all it needs is installed (see docs/gpu.md)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from gpu.steps import DEVICE

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"))

from gpu_model import TINY, make_model
from gpu_server import add_tokenizer, missing, node


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    lacking = missing()
    if lacking:
        pytest.skip(f"the server needs what is not installed here: {' '.join(lacking)}")
    folder = make_model(tmp_path_factory.mktemp("served"), TINY, device=DEVICE.type)
    add_tokenizer(folder)
    with node(folder, device=DEVICE.type, batch_size=16, longest=1024) as address:
        yield address


def ask(url: str, index: int) -> dict[str, object]:
    body = {
        "input_ids": [3 + (7 * index + i) % 900 for i in range(20 + 40 * index)], "max_dec_len": 24,
        "infer_seed": index, "temperature": 0.0 if index % 2 else 0.9, "topp": 0.9,
    }  # fmt: skip
    request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_requests_in_a_crowd_say_what_they_say_alone(url: str) -> None:
    alone = [ask(url, index)["tokens_all"] for index in range(8)]
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda index: ask(url, index % 8)["tokens_all"], range(16)))
    assert crowd == alone * 2
    assert all(alone)
