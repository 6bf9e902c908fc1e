"""vLLM on the CPU, W8A8, in this process, on the same checkpoint but for a bf16 head (it has no int8 one)."""

from __future__ import annotations

import os

from protocol import SteppedPeer, main


class Vllm(SteppedPeer):
    def __init__(self, folder: str, threads: int) -> None:
        super().__init__()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, range(threads))))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=32,
            enable_prefix_caching=False,
            disable_log_stats=True,
            dtype="bfloat16",
        ).llm_engine
        self._next = 0
        self._living: dict[str, int] = {}  # tokens so far
        self.engine = self

    def add(self, prompt: list[int], output: int) -> int:
        self._next += 1
        name = str(self._next)
        params = self._params(max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=False)
        self._llm.add_request(name, {"prompt_token_ids": prompt}, params)
        self._living[name] = 0
        return self._next

    def step(self) -> list[tuple[int, int, bool]]:
        out = []
        for answer in self._llm.step():
            if answer.request_id not in self._living:
                continue
            total = len(answer.outputs[0].token_ids)
            out.append((int(answer.request_id), total - self._living[answer.request_id], answer.finished))
            self._living[answer.request_id] = total
            if answer.finished:
                del self._living[answer.request_id]
        return out

    def cancel(self, names: list[int]) -> None:
        self._llm.abort_request([str(name) for name in names])
        for name in names:
            self._living.pop(str(name), None)


if __name__ == "__main__":
    main(Vllm)
