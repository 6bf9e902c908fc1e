"""Every family against transformers in float32: logits, greedy tokens, whatever the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from models.harness import Harness, load_harness
from models.tiny_checkpoints import (
    VOCAB,
    family_configs,
    make_model,
    reference_logits,
    save_model,
    write_internlm2,
    write_internlm3,
    write_yi,
)

# float32 rounding through two layers, of logits that reach some tens: sums are added in another order
RELATIVE = 2e-5
NAMES = [*family_configs(), "internlm2", "internlm3", "yi"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name → (transformers model, harness in float mode); made when first asked for."""
    made: dict[str, tuple[Any, Harness]] = {}

    def get(name: str) -> tuple[Any, Harness]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = (
                _write(name, folder),
                load_harness(folder, weight_quant="none", dtype="float32", int8_cache=False),
            )
        return made[name]

    return get


def _write(name: str, folder: Path) -> Any:
    if name == "internlm2":
        return write_internlm2(folder)
    if name == "internlm3":
        return write_internlm3(folder)
    if name == "yi":
        return write_yi(folder)
    model = make_model(family_configs()[name])
    save_model(model, folder)
    return model


def _prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_logits_match_transformers(checkpoints: Any, name: str) -> None:
    model, harness = checkpoints(name)
    prompt = _prompt(150)  # longer than a tile, a window, and the old context of llama3's rope
    want = reference_logits(model, prompt)
    got = harness.prefill(prompt, chunk=150)
    assert float((got - want).abs().max()) <= RELATIVE * float(want.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_match_transformers_for_any_chunks(checkpoints: Any, name: str) -> None:
    model, harness = checkpoints(name)
    prompt = _prompt(45)
    whole = harness.greedy(prompt, chunk=45, count=64)
    want = reference_logits(model, prompt + whole).argmax(dim=1).tolist()[44:-1]
    assert whole == want
    assert harness.greedy(prompt, chunk=7, count=64, slot=1) == whole
    assert harness.greedy(prompt, chunk=1, count=64, slot=2) == whole


def test_interleaved_rows_are_the_same_in_int8(tmp_path: Path) -> None:
    save_model(write_internlm2(tmp_path / "internlm2"), tmp_path / "llama")
    prompt = _prompt(80)
    logits = [
        load_harness(tmp_path / name, weight_quant="a8w8").prefill(prompt, chunk=80) for name in ("internlm2", "llama")
    ]
    assert torch.equal(logits[0], logits[1])


def test_a_step_that_wants_no_logits_fills_the_cache(checkpoints: Any) -> None:
    _, harness = checkpoints("mistral_window")
    prompt = _prompt(40)
    whole = harness.prefill(prompt, chunk=40, slot=3)
    harness.computed[4] = 0
    assert harness.step([(4, prompt[:33])], wanted=False)[0].shape == (0, VOCAB)
    assert torch.equal(harness.step([(4, prompt[33:])])[0], whole[33:])
