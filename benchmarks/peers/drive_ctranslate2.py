"""CTranslate2, int8: batches of equal length. FOLDER is the converted model.

`prepare` needs torch and transformers beside ctranslate2. It has no continuous batching: `serve` runs batch after
batch.
"""

from __future__ import annotations

import time

from protocol import SteppedPeer, figures, main


def prepare(source: str, target: str) -> None:
    """SOURCE: the bf16 checkpoint with its tokenizer."""
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(source, load_as_float16=False, low_cpu_mem_usage=True).convert(
        target, quantization="int8", force=True
    )


def pairs(row: list[float]) -> list[tuple[float, float]]:
    return [(row[index], row[index + 1]) for index in range(len(row) - 1)]


class CTranslate(SteppedPeer):
    room = 16_384  # its cache is float32, and so are the activations of all prompts, which it computes at once

    def __init__(self, folder: str, threads: int) -> None:
        super().__init__()
        import json
        from pathlib import Path

        import ctranslate2

        self._generator = ctranslate2.Generator(folder, device="cpu", compute_type="int8", intra_threads=threads)
        self._tokens = json.loads((Path(folder) / "vocabulary.json").read_text())

    def _generate(self, prompts: list[list[int]], output: int) -> tuple[list[float], dict[int, list[float]]]:
        """The moments at which each prompt's tokens came; and when all began."""
        moments: dict[int, list[float]] = {}

        def came(step: object) -> bool:
            moments.setdefault(step.batch_id, []).append(time.perf_counter())
            return False

        began = time.perf_counter()
        self._generator.generate_batch(
            [[self._tokens[token] for token in ids] for ids in prompts],
            max_length=output,
            min_length=output,
            include_prompt_in_result=False,
            sampling_topk=1,
            beam_size=1,
            callback=came,
        )
        return [began, time.perf_counter()], moments

    def fill(self, batch: int, context: int) -> dict[str, float]:
        self._prompts = [self.prompt_ids(context) for _ in range(batch)]
        return {}

    def shrink(self, batch: int) -> dict[str, float]:
        del self._prompts[batch:]
        return {}

    def decode(self, tokens: int) -> dict[str, float]:
        """Nothing stays between calls, so the prompts are computed again, outside of what is timed."""
        _, moments = self._generate(self._prompts, tokens + 1)
        first, last = max(row[0] for row in moments.values()), max(row[-1] for row in moments.values())
        return {"tok_s": len(self._prompts) * tokens / (last - first)}

    def prompt(self, tokens: int) -> dict[str, float]:
        (began, ended), _ = self._generate([self.prompt_ids(tokens)], 1)
        return {"tok_s": tokens / (ended - began)}

    def serve(self, requests: int, at_once: int, prompt: int, output: int) -> dict[str, float]:
        first, gaps = [], []
        began = time.perf_counter()
        for start in range(0, requests, at_once):
            count = min(at_once, requests - start)
            (asked, _), moments = self._generate([self.prompt_ids(prompt) for _ in range(count)], output)
            first += [row[0] - asked for row in moments.values()]
            gaps += [after - before for row in moments.values() for before, after in pairs(row)]
        return figures(requests * output / (time.perf_counter() - began), first, gaps)


if __name__ == "__main__":
    main(CTranslate, prepare=prepare)
