"""transformers in bf16, eager: batches of equal length with its own cache. FOLDER is the bf16 checkpoint.

It has no server of its own on a CPU: `serve` runs batch after batch, each to its end.
"""

from __future__ import annotations

import time

from protocol import SteppedPeer, figures, main


class Transformers(SteppedPeer):
    room = 32_768  # it computes all prompts at once: the activations of more would fill the memory

    def __init__(self, folder: str, threads: int) -> None:
        super().__init__()
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def _forward(self, ids: list[list[int]], cache: object = None) -> tuple[list[list[int]], object]:
        torch = self._torch
        with torch.inference_mode():
            out = self._model(torch.tensor(ids), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[:, -1].argmax(-1, keepdim=True).tolist(), out.past_key_values

    def fill(self, batch: int, context: int) -> dict[str, float]:
        began = time.perf_counter()
        self._last, self._cache = self._forward([self.prompt_ids(context) for _ in range(batch)])
        return {"tok_s": batch * context / (time.perf_counter() - began)}

    def shrink(self, batch: int) -> dict[str, float]:
        self._cache.batch_select_indices(self._torch.arange(batch))
        del self._last[batch:]
        return {}

    def decode(self, tokens: int) -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(tokens):
            self._last, self._cache = self._forward(self._last, self._cache)
        return {"tok_s": len(self._last) * tokens / (time.perf_counter() - began)}

    def prompt(self, tokens: int) -> dict[str, float]:
        ids = self.prompt_ids(tokens)
        began = time.perf_counter()
        self._forward([ids])
        return {"tok_s": tokens / (time.perf_counter() - began)}

    def serve(self, requests: int, at_once: int, prompt: int, output: int) -> dict[str, float]:
        first, gaps = [], []
        began = time.perf_counter()
        for start in range(0, requests, at_once):
            count = min(at_once, requests - start)
            asked = time.perf_counter()
            last, cache = self._forward([self.prompt_ids(prompt) for _ in range(count)])
            before = time.perf_counter()
            first += [before - asked] * count
            for _ in range(output - 1):
                last, cache = self._forward(last, cache)
                now = time.perf_counter()
                gaps += [now - before] * count
                before = now
        return figures(requests * output / (time.perf_counter() - began), first, gaps)


if __name__ == "__main__":
    main(Transformers)
