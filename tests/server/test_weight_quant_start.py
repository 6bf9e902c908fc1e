"""WEIGHT_QUANT of a float checkpoint through a whole start: it shows how far it is, and then serves the logits of the
dequantised model.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
import transformers
from torch import Tensor

from models.tiny_checkpoints import BASE, VOCAB, make_model, reference_logits, save_model
from octavo.quantization.scheme import dequantize, quantize_per_channel
from quantization.format_fixtures import linears, round_per_token
from quantize.making import with_tokenizer
from server.conftest import REPOSITORY, Server, make_server
from server.looking import looking

pytestmark = pytest.mark.server

PROMPT = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()
NUM_LAYERS = 12
# of log probabilities, relative: two limbs are nearly exact; in 8 bits an input at the edge may round to either side
BOUNDS = {"wint8": 0.0005, "a8w8": 0.02}
SCHEMES = {"wint8": "w8a16", "a8w8": "w8a8"}


@pytest.fixture(scope="module")
def model() -> Any:
    made = make_model(transformers.LlamaConfig(**{**BASE, "num_hidden_layers": NUM_LAYERS}))
    for parameter in made.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return made


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_model(copy.deepcopy(model).bfloat16(), tmp_path_factory.mktemp("float"))
    with_tokenizer(made, model)
    return made


class Progress:
    """What /v2/health tells of a load."""

    def __init__(self, server: Server) -> None:
        self._url = f"{server.health}/v2/health"
        self.seen: list[float] = []  # fractions of the weights

    def look(self) -> None:
        body = self._ask()
        if body.get("state") == "loading" and body["progress"]["stage"] == "weights":
            assert not body["ready"]
            self.seen.append(body["progress"]["fraction"])

    def _ask(self) -> dict[str, Any]:
        with suppress(URLError, OSError, ValueError):
            try:
                return dict(json.loads(urlopen(self._url, timeout=5).read()))
            except HTTPError as error:
                return dict(json.loads(error.read()))
        return {}


@pytest.fixture
def server(folder: Path, tmp_path: Path, weight_quant: str) -> Iterator[Server]:
    """Not started yet; stopped at the end."""
    exact = {"DTYPE": "float32", "USE_CACHE_KV_INT8": "0", "PYTHONPATH": str(REPOSITORY / "serving")}
    one = make_server(tmp_path / "run", MODEL_DIR=str(folder), WEIGHT_QUANT=weight_quant, MAX_DEC_LEN="64", **exact)
    yield one
    assert one.script("stop_server.sh").returncode == 0


def start_slowly(server: Server) -> subprocess.CompletedProcess[str]:
    """The start command around an engine that takes its time for each layer."""
    command = [sys.executable, str(Path(__file__).with_name("slow_load.py"))]
    return subprocess.run(command, env=server.environ, text=True, timeout=120, capture_output=True, check=False)


def served_logprobs(server: Server) -> list[tuple[int, int, float]]:
    """(position, token, log probability) of the prompt's tokens but the first, and of the most probable ones there."""
    body = {"input_ids": PROMPT, "max_dec_len": 1, "prompt_logprobs": 20}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{server.gateway}/v1/chat/completions", json.dumps(body).encode(), headers)
    found = json.loads(urlopen(request, timeout=60).read())["prompt_logprobs"]
    assert found[0] is None
    return [
        (position, one["id"], one["logprob"])
        for position, entry in enumerate(found[1:])
        for one in (entry, *entry["top"])
    ]


def dequantised_logprobs(model: Any, weight_quant: str) -> Tensor:
    """[T, V]: weights through 8 bits and back, and with a8w8 the inputs of products too."""
    exact = {name: module.weight.data for name, module in linears(model)}
    handles = []
    for _, module in linears(model):
        module.weight.data = dequantize(quantize_per_channel(module.weight.data))
        if weight_quant == "a8w8":
            handles.append(module.register_forward_pre_hook(lambda _, inputs: (round_per_token(inputs[0], 0.0),)))
    found = reference_logits(model, PROMPT).log_softmax(dim=1)
    for handle in handles:
        handle.remove()
    for name, weight in exact.items():
        model.get_submodule(name).weight.data = weight
    return found


@pytest.mark.parametrize("weight_quant", ["wint8", "a8w8"])
def test_a_float_model_is_quantised_with_progress_and_served_as_the_dequantised_one(
    model: Any, server: Server, weight_quant: str
) -> None:
    progress = Progress(server)
    with looking(progress.look):
        started = start_slowly(server)
    assert started.returncode == 0, started.stdout + started.stderr
    assert progress.seen == sorted(progress.seen)
    steps = {fraction for fraction in progress.seen if 0 < fraction < 1}
    assert len(steps) >= 3
    assert all(fraction * NUM_LAYERS == pytest.approx(round(fraction * NUM_LAYERS), abs=0.01) for fraction in steps)
    assert len(re.findall(r"^  loading weights \d+ %$", started.stdout, re.MULTILINE)) >= 3
    assert "state: loading (loading weights " in (server.run_dir / "log" / "node.log").read_text()
    info = json.loads(urlopen(f"{server.health}/v2/health", timeout=5).read())["model"]
    assert info["weight_scheme"] == SCHEMES[weight_quant]
    positions, tokens, served = zip(*served_logprobs(server))
    wanted = dequantised_logprobs(model, weight_quant)[list(positions), list(tokens)]
    assert float((torch.tensor(served) - wanted).norm() / wanted.norm()) < BOUNDS[weight_quant]
