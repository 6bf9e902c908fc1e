"""Run by another Python, one with vLLM: loads a checkpoint and prints what it says to some prompts.

`python vllm_peer.py FOLDER`, on standard input JSON: {"prompts": [[id, …], …], "max_tokens": n}. The last line printed
is JSON: for each prompt the greedy tokens and the log probability of each prompt token but the first.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answers(folder: str, asked: dict[str, Any]) -> list[dict[str, list[Any]]]:
    """One object a prompt: `tokens`, `log_p`."""
    from vllm import LLM, SamplingParams
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    # its kernels for AMX take no float32, and write every input per token, whatever the checkpoint says
    cpu.check_cpu_sgl_kernel = lambda *_: False
    llm = LLM(
        folder,
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=asked["max_tokens"], ignore_eos=True, prompt_logprobs=0, detokenize=False
    )
    found = []
    for prompt in asked["prompts"]:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        log_p = [step[token].logprob for token, step in zip(prompt[1:], output.prompt_logprobs[1:])]
        found.append({"tokens": list(output.outputs[0].token_ids), "log_p": log_p})
    return found


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1], json.load(sys.stdin))))
