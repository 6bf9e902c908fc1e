"""Other engines on the same shape, each in a process of its own: their memory is free again when they end.

    python benchmarks/gpu/gpu_peers.py transformers|vllm-bf16|vllm-w8a8 FOLDER REQUESTS PROMPT OUTPUT DEVICE

prints one line of JSON: tokens per second, or why there are none. Used by bench.py.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 150
PACKAGES = {"transformers": "transformers", "vllm-bf16": "vllm", "vllm-w8a8": "vllm"}
Prompts = list[list[int]]


def measure(
    peer: str, folder: Path, sizes: tuple[int, int, int], device: str, *, seconds: float = SECONDS
) -> float | str:
    """Output tokens per second of requests x (prompt + output), or one line that says why there is no figure."""
    if importlib.util.find_spec(PACKAGES[peer]) is None:
        return f"{PACKAGES[peer]} is not installed"
    command = [sys.executable, __file__, peer, str(folder), *map(str, sizes), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_second"')]
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1][:200]
    return float(json.loads(lines[-1])["tokens_per_second"])


def transformers_batch(folder: Path, prompts: Prompts, output: int, device: str) -> float:
    """`generate_batch` with random bfloat16 weights of the shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    settings = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1)
    # by itself it takes what memory there is: right on a card, not on the host of a dry run
    batching = None if device == "cuda" else ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    for _ in range(2):  # the first run compiles
        began = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=settings, continuous_batching_config=batching)
        seconds = time.perf_counter() - began
    return sum(len(answer.generated_tokens) for answer in outputs.values()) / seconds


def vllm_batch(folder: Path, prompts: Prompts, output: int, *, bf16: bool) -> float:
    """vLLM on our checkpoint, or on the same shape in bfloat16 with weights that it makes up."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"max_model_len": len(prompts[0]) + output + 1, "max_num_seqs": len(prompts)}
    if bf16:
        folder, options["load_format"] = without_quantization(folder), "dummy"
    llm = LLM(model=str(folder), skip_tokenizer_init=True, enable_prefix_caching=False, **options)
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False)
    for _ in range(2):
        began = time.perf_counter()
        answers = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - began
    return sum(len(answer.outputs[0].token_ids) for answer in answers) / seconds


def without_quantization(folder: Path) -> Path:
    """A folder with the same configuration for float weights."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    target = Path(tempfile.mkdtemp(prefix="octavo-bf16-"))
    (target / "config.json").write_text(json.dumps(config))
    return target


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    requests, prompt, output = map(int, sys.argv[3:6])
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = np.random.default_rng(1).integers(3, vocab, (requests, prompt)).tolist()
    if peer == "transformers":
        rate = transformers_batch(folder, prompts, output, sys.argv[6])
    else:
        rate = vllm_batch(folder, prompts, output, bf16=peer == "vllm-bf16")
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
