"""OpenVINO GenAI's continuous batching: int8 weights, u8 cache. FOLDER is the converted model.

`prepare` needs optimum-intel (an environment of its own); without it the model cannot be made here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from protocol import SteppedPeer, main

MAX_BATCHED = 256  # its own default: prompts in chunks between the tokens of others


def prepare(source: str, target: str) -> None:
    """SOURCE: the bf16 checkpoint with its tokenizer."""
    program = Path(sys.executable).parent / "optimum-cli"
    options = ["--task", "text-generation-with-past", "--weight-format", "int8"]
    command = [str(program), "export", "openvino", "--model", source, *options, target]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, target)


class OpenVino(SteppedPeer):
    def __init__(self, folder: str, threads: int) -> None:
        super().__init__()
        import openvino_genai as genai

        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 2  # GB
        scheduler.max_num_batched_tokens = MAX_BATCHED
        scheduler.max_num_seqs = 32
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": threads, "KV_CACHE_PRECISION": "u8", "PERFORMANCE_HINT": "LATENCY"}
        self._genai = genai
        self._pipeline = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._next = 0
        self._living: dict[int, object] = {}
        self._left: dict[int, int] = {}
        self.engine = self

    def add(self, prompt: list[int], output: int) -> int:
        import numpy as np
        import openvino

        self._next += 1
        config = self._genai.GenerationConfig(max_new_tokens=output, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        self._living[self._next] = self._pipeline.add_request(self._next, ids, config)
        self._left[self._next] = output
        return self._next

    def step(self) -> list[tuple[int, int, bool]]:
        self._pipeline.step()
        out = []
        for name, handle in list(self._living.items()):
            count = 0
            while handle.can_read():
                count += sum(len(output.generated_ids) for output in handle.read().values())
            if not count:
                continue
            self._left[name] -= count
            out.append((name, count, self._left[name] <= 0))
            if self._left[name] <= 0:
                del self._living[name], self._left[name]
        return out

    def cancel(self, names: list[int]) -> None:
        for name in names:
            self._living.pop(name).cancel()


if __name__ == "__main__":
    main(OpenVino, prepare=prepare)
