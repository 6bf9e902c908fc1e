"""Every row of the table of checkpoints: its folder is inspected and served by the whole engine, tokens as expected.

Expected is the greedy choice of the dequantised float model wherever that is clear: its first token leads the second by
more than the bound of the scheme. How near all logits are stands in the tests of each format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.tiny_checkpoints import (
    VOCAB,
    edit_config,
    edit_tensors,
    family_configs,
    make_model,
    reference_logits,
    save_model,
)
from octavo.cli.main import main
from octavo.engine.llm import LLM, Sampling
from quantization.compressed_fixtures import Variant, write_compressed
from quantization.format_fixtures import (
    SMOOTH_QUANT,
    fp8_config,
    fp8_linear,
    gptq_config,
    gptq_linear,
    smooth_quant_linear,
    write_absmax,
    write_model,
)
from quantize.making import with_tokenizer

PROMPTS = torch.randint(3, VOCAB, (240, 20), generator=torch.Generator().manual_seed(3)).tolist()
CLEAR = 0.2  # of the largest logit: eight bits and a conversion may move each of the two by 0.1
LEAST = 6  # prompts whose next token must be clear


def float_folder(folder: Path) -> Any:
    model = make_model(family_configs()["llama2"])
    save_model(model, folder)
    return model


def separate_cache_scales(folder: Path) -> Any:
    model = write_model(folder, smooth_quant_linear, SMOOTH_QUANT)
    names = [f"model.layers.{layer}.self_attn.{x}_cache.scale" for layer in range(2) for x in "kv"]
    save_file({name: torch.tensor([0.05]) for name in names}, folder / "kv_cache_scales.safetensors")
    return model


def cache_scales(folder: Path) -> Any:
    model = write_compressed(folder, Variant(activations="dynamic"))
    names = [f"model.layers.{layer}.self_attn.{x}_scale" for layer in range(2) for x in "kv"]
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.full((2, 1, 1), 0.05) for name in names}))
    scheme = {"num_bits": 8, "type": "int", "strategy": "attn_head", "dynamic": False}
    edit_config(folder, lambda raw: raw["quantization_config"].update(kv_cache_scheme=scheme))
    return model


# row: what writes the folder and returns the dequantised model; the schemes of weights and of the cache
Row = tuple[Callable[[Path], Any], str, str]
ROWS: dict[str, Row] = {
    "float": (float_folder, "w8a16", "int8 dynamic"),
    "int-quantized W8A8": (lambda f: write_compressed(f, Variant(activations="dynamic")), "w8a8", "int8 dynamic"),
    "int-quantized static": (lambda f: write_compressed(f, Variant(activations="static")), "w8a8", "int8 dynamic"),
    "int-quantized W8A16": (lambda f: write_compressed(f, Variant()), "w8a16", "int8 dynamic"),
    "pack-quantized": (lambda f: write_compressed(f, Variant(format="pack-quantized")), "w8a16", "int8 dynamic"),
    "kv_cache_scheme": (cache_scales, "w8a8", "int8 static per head"),
    "kv_cache_scales.safetensors": (separate_cache_scales, "w8a8", "int8 static"),
    "smooth_quant": (lambda f: write_model(f, smooth_quant_linear, SMOOTH_QUANT), "w8a8", "int8 dynamic"),
    "fp8 static": (
        lambda f: write_model(f, fp8_linear(per_row=False, static=True), fp8_config("static")),
        "w8a16 from fp8",
        "int8 dynamic",
    ),
    "fp8 dynamic": (
        lambda f: write_model(f, fp8_linear(per_row=True, static=False), fp8_config("dynamic")),
        "w8a16 from fp8",
        "int8 dynamic",
    ),
    "A8W8C8 in json": (lambda f: write_absmax(f, store_int8=True), "w8a8", "int8 static per head"),
    "GPTQ": (
        lambda f: write_model(f, gptq_linear(group_size=32), gptq_config(group_size=32)),
        "w8a16",
        "int8 dynamic",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_inspected_and_served(tmp_path: Path, row: str, capsys: pytest.CaptureFixture[str]) -> None:
    write, weights, cache = ROWS[row]
    model = with_tokenizer(tmp_path, write(tmp_path))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert {one["scheme"] for one in json.loads(capsys.readouterr().out)["caches"]} == {cache}
    logits = torch.stack([reference_logits(model, prompt)[-1] for prompt in PROMPTS])  # [prompts, VOCAB]
    best, second = logits.topk(2, dim=1).values.T
    clear = (best - second) > CLEAR * logits.abs().max()
    with LLM(tmp_path, max_seq_len=128, max_dec_len=16, num_threads=1, progress=False) as llm:
        assert llm.info.weight_scheme == weights
        asked = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        answers = [one.token_ids[0] for one in llm.generate(PROMPTS, asked, progress=False)]
    agreed = torch.tensor(answers) == logits.argmax(dim=1)
    assert int(clear.sum()) >= LEAST
    assert bool(agreed[clear].all())
