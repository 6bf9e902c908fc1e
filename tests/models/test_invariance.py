"""A sequence's logits have the same bits alone, in a batch, and in chunks of any size: int8 weights, int8 cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.harness import Harness, load_harness
from models.tiny_checkpoints import VOCAB, family_configs, make_model, save_model
from octavo.kernels.choose import NoSuchKernels

CASES = [("qwen3", "wint8"), ("qwen2_window", "a8w8"), ("mixtral", "wint8")]
LENGTHS = (150, 131, 40, 7, 64)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_model(make_model(family_configs()[name], dtype=torch.bfloat16), tmp_path_factory.mktemp(name))
        for name, _ in CASES
    }


def _load(folder: Path, *, weight_quant: str, kernels: str) -> Harness:
    try:
        return load_harness(folder, weight_quant=weight_quant, kernels=kernels)
    except NoSuchKernels as error:
        pytest.skip(str(error))


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.mark.parametrize("kernels", ["reference", "avx2", "avx512", "amx"])
@pytest.mark.parametrize(("name", "weight_quant"), CASES)
def test_bits_do_not_depend_on_chunks(folders: dict[str, Path], name: str, weight_quant: str, kernels: str) -> None:
    harness = _load(folders[name], weight_quant=weight_quant, kernels=kernels)
    prompt = _prompts()[0]
    whole = harness.prefill(prompt, chunk=len(prompt))
    for slot, chunk in enumerate((1, 7, 64), start=1):
        assert torch.equal(harness.prefill(prompt, chunk=chunk, slot=slot), whole)


@pytest.mark.parametrize("kernels", ["reference", "avx2", "avx512", "amx"])
@pytest.mark.parametrize(("name", "weight_quant"), CASES)
def test_bits_do_not_depend_on_the_batch(folders: dict[str, Path], name: str, weight_quant: str, kernels: str) -> None:
    harness = _load(folders[name], weight_quant=weight_quant, kernels=kernels)
    prompts = _prompts()
    alone = [harness.prefill(prompt, chunk=len(prompt)) for prompt in prompts]
    # all at once: the odd ones have all but their last token in the cache, so that prompts and decodes share the step
    harness.computed.clear()
    for slot in (1, 3):
        harness.step([(slot, prompts[slot][:-1])])
    parts = [(slot, prompt[-1:] if slot in (1, 3) else prompt) for slot, prompt in enumerate(prompts)]
    together = harness.step(parts)
    for slot, logits in enumerate(together):
        assert torch.equal(logits, alone[slot][-len(logits) :])
