"""The engine without a server: tokens per second of the same loop and runner. Prints one number.

python benchmarks/engine_alone.py STREAMS OUTPUT_TOKENS [MODEL_DIR]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from octavo.engine.llm import LLM, Sampling

REPOSITORY = Path(__file__).resolve().parents[1]
PROMPT = "写一个故事"


def measure(streams: int, tokens: int, model_dir: Path) -> float:
    """One warm-up, then all streams at once to their full length."""
    llm = LLM(model_dir, batch_size=48, progress=False)
    options = [
        Sampling(max_tokens=tokens, temperature=0.95, top_p=0.7, ignore_eos=True, seed=i) for i in range(streams)
    ]
    llm.generate([PROMPT] * 2, Sampling(max_tokens=32, ignore_eos=True), progress=False)
    began = time.perf_counter()
    answers = llm.generate([PROMPT] * streams, options, progress=False)
    seconds = time.perf_counter() - began
    llm.close()
    return sum(answer.usage.completion_tokens for answer in answers) / seconds


if __name__ == "__main__":
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else REPOSITORY / "demo" / "model"
    print(measure(int(sys.argv[1]), int(sys.argv[2]), folder))
