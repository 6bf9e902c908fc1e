"""Other engines on the same shape, each in a process of its own: their memory is free again when they end.

    python benchmarks/gpu/gpu_peers.py transformers|vllm-bf16|vllm-w8a8 FOLDER REQUESTS PROMPT OUTPUT DEVICE [SECONDS]

prints one line of JSON with tokens per second. Used by bench.py, which ends them, and all that they started, when their
time is over; given SECONDS, they also end by themselves, should bench.py be gone by then.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
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
    return run([sys.executable, __file__, peer, str(folder), *map(str, sizes), device, str(seconds)], seconds)


def run(command: list[str], seconds: float) -> float | str:
    """The rate that a command prints, or why it printed none. Nothing that it started outlives it."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as scratch:
        process = subprocess.Popen(command, **pipes, start_new_session=True, env=environ(scratch))
        try:
            out, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in out.splitlines() if line.startswith('{"tokens_per_second"')]
    if process.returncode or not lines:
        return reason(said) or f"ended with {process.returncode} and said nothing"
    return float(json.loads(lines[-1])["tokens_per_second"])


def reason(said: str) -> str:
    """The last line that names an error, or the last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line.split(" ", 1)[0] or "Error:" in line]
    return ([*lines, *errors] or [""])[-1][:300]


def environ(scratch: str) -> dict[str, str]:
    """Nothing is asked of a network, and files that another engine makes go when it ends."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TMPDIR": scratch}


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
    options["gpu_memory_utilization"] = 0.85  # it counts all memory of the card, and bench.py has some of it
    if bf16:
        folder, options["load_format"] = without_quantization(folder), "dummy"
    else:
        folder = with_float_head(folder)
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


def with_float_head(folder: Path) -> Path:
    """The same checkpoint with a bfloat16 head: vLLM has no int8 one. The layers' files are linked."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    target = Path(tempfile.mkdtemp(prefix="octavo-float-head-"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    places = index["weight_map"]
    own = places["lm_head.weight"]
    for name in set(places.values()) - {own}:
        (target / name).symlink_to((folder / name).resolve())
    with safe_open(folder / own, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    scale = tensors.pop("lm_head.weight_scale")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(scale.dtype) * scale
    save_file(tensors, target / own)
    del places["lm_head.weight_scale"]
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (target / "config.json").write_text(json.dumps(config))
    return target


def end_after(seconds: float) -> None:
    """End this process, and all that it started, then: if it leads a session, as bench.py starts it."""
    if os.getsid(0) == os.getpid():
        timer = threading.Timer(seconds, lambda: os.killpg(0, signal.SIGKILL))
        timer.daemon = True
        timer.start()


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    requests, prompt, output = map(int, sys.argv[3:6])
    if len(sys.argv) > 7:
        end_after(float(sys.argv[7]) + 5)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompts = np.random.default_rng(1).integers(3, vocab, (requests, prompt)).tolist()
    if peer == "transformers":
        rate = transformers_batch(folder, prompts, output, sys.argv[6])
    else:
        rate = vllm_batch(folder, prompts, output, bf16=peer == "vllm-bf16")
    print(json.dumps({"tokens_per_second": rate}))


if __name__ == "__main__":
    main()
