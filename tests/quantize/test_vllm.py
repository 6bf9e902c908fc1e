"""vLLM loads what we make and agrees. Runs where OCTAVO_VLLM_PYTHON names a Python that has vLLM for CPU."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from models.harness import load_harness
from models.tiny_checkpoints import BASE, VOCAB, make_model
from quantize import vllm_peer
from quantize.making import make, relative, write_float

PYTHON = os.environ.get("OCTAVO_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="OCTAVO_VLLM_PYTHON names no Python with vLLM"),
]


def ask(folder: Path, prompts: list[list[int]], *, max_tokens: int) -> Any:
    """What vLLM says: `tokens` and `log_p` of each prompt."""
    done = run_peer(folder, prompts, max_tokens=max_tokens)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run_peer(folder: Path, prompts: list[list[int]], *, max_tokens: int) -> subprocess.CompletedProcess[str]:
    assert PYTHON is not None
    asked = json.dumps({"prompts": prompts, "max_tokens": max_tokens})
    environ = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    command = [PYTHON, vllm_peer.__file__, str(folder)]
    return subprocess.run(command, input=asked, env=environ, capture_output=True, text=True, timeout=900)


def ours(folder: Path, prompt: list[int]) -> torch.Tensor:
    """The log probability of every prompt token but the first, with a float cache as vLLM has it."""
    logits = load_harness(folder, int8_cache=False, dtype="float32").prefill(prompt, chunk=64)
    return logits[:-1].log_softmax(dim=-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def made_folder(tmp_path: Path, scheme: str) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_float(tmp_path / "float", model=make_model(transformers.LlamaConfig(**{**BASE, **sizes, "head_dim": 64})))
    return make(tmp_path / "float", "--no-ablation", scheme=scheme)


@pytest.mark.parametrize(("scheme", "bound"), [("a8w8", 0.005), ("a8w8-static", 0.005)])
def test_vllm_loads_what_is_made_and_agrees(tmp_path: Path, scheme: str, bound: float) -> None:
    made = made_folder(tmp_path, scheme)
    prompt = random.Random(0).choices(range(3, VOCAB), k=50)
    (answer,) = ask(made, [prompt], max_tokens=4)
    assert len(answer["tokens"]) == 4
    assert relative(torch.tensor(answer["log_p"]), ours(made, prompt)) < bound


def test_vllm_reads_w8a16_but_has_no_kernel_for_it_on_processors(tmp_path: Path) -> None:
    """What docs/quantize.md says; should it change, this fails and the document may promise more."""
    done = run_peer(made_folder(tmp_path, "w8a16"), [[5] * 10], max_tokens=1)
    assert done.returncode != 0
    assert "Failed to find a kernel that can implement the WNA16 linear layer" in done.stderr
