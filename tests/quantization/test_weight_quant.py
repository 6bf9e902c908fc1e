"""WEIGHT_QUANT and DTYPE on a float checkpoint."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.harness import load_harness
from models.tiny_checkpoints import VOCAB, family_configs, make_model, reference_logits, save_model
from octavo.cli.main import main
from octavo.engine.llm import LLM
from quantization.format_fixtures import SMOOTH_QUANT, smooth_quant_linear, write_model
from quantize.making import with_tokenizer

PROMPT = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = make_model(family_configs()["llama2"])
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    # saved as a copy: a cast of the whole model would round its rotary buffers too
    return model, save_model(copy.deepcopy(model).bfloat16(), tmp_path_factory.mktemp("bf16"))


@pytest.mark.parametrize(
    ("weight_quant", "scheme"), [("auto", "w8a16"), ("wint8", "w8a16"), ("a8w8", "w8a8"), ("none", "bfloat16")]
)
def test_each_setting_names_its_scheme(checkpoint: tuple[Any, Path], weight_quant: str, scheme: str) -> None:
    model = load_harness(checkpoint[1], weight_quant=weight_quant).model
    assert model.weight_scheme == scheme
    assert model.head.format.limbs == 0  # heads stay float
    assert model.embedding.dtype == torch.bfloat16


def test_more_bits_are_closer(checkpoint: tuple[Any, Path]) -> None:
    model, folder = checkpoint
    want = reference_logits(model, PROMPT)
    errors = {}
    for weight_quant in ("none", "wint8", "a8w8"):
        got = load_harness(folder, weight_quant=weight_quant, int8_cache=False, dtype="float32").prefill(
            PROMPT, chunk=60
        )
        errors[weight_quant] = float((got - want).abs().mean() / want.abs().mean())
    assert errors["none"] < 1e-5  # the same float32 arithmetic
    assert errors["none"] < errors["wint8"] < errors["a8w8"] < 0.1


@pytest.mark.parametrize(("head_quant", "limbs", "bound"), [("wint8", 2, 0.02), ("a8w8", 1, 0.03)])
@pytest.mark.parametrize("family", ["llama2", "llama3_tied"])
def test_a_float_head_is_written_in_8_bits_when_asked(
    tmp_path: Path, family: str, head_quant: str, limbs: int, bound: float
) -> None:
    model = make_model(family_configs()[family])
    folder = save_model(model, tmp_path)
    want = reference_logits(model, PROMPT)
    kept = load_harness(folder, weight_quant="none", int8_cache=False)
    changed = load_harness(folder, weight_quant="none", int8_cache=False, head_quant=head_quant)
    assert kept.model.head.format.limbs == 0
    assert changed.model.head.format.limbs == limbs
    assert changed.model.head.nbytes < 0.5 * kept.model.head.nbytes
    got = changed.prefill(PROMPT, chunk=60)
    assert not torch.equal(got, kept.prefill(PROMPT, chunk=60))
    assert float((got - want).norm() / want.norm()) < bound
    assert torch.equal(got, changed.prefill(PROMPT, chunk=7))


def test_a_quantised_checkpoints_float_head_too_and_the_report_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, smooth_quant_linear, SMOOTH_QUANT)
    monkeypatch.setenv("HEAD_QUANT", "wint8")
    assert main(["inspect", str(tmp_path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("lm_head "))
    for part in ("float32", "int8 per channel", "two int8 per token"):
        assert part in line


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_is_the_type_of_float_layers(checkpoint: tuple[Any, Path], dtype: str) -> None:
    model = load_harness(checkpoint[1], weight_quant="none", dtype=dtype).model
    assert model.weight_scheme == dtype
    assert str(model.embedding.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize("weight_quant", ["wint8", "a8w8"])
def test_the_bar_of_a_load_in_process(
    checkpoint: tuple[Any, Path], capsys: pytest.CaptureFixture[str], weight_quant: str
) -> None:
    folder = checkpoint[1]
    with_tokenizer(folder, checkpoint[0])
    with LLM(folder, weight_quant=weight_quant, max_seq_len=128, max_dec_len=16, num_threads=1) as llm:
        assert llm.info.weight_scheme == {"wint8": "w8a16", "a8w8": "w8a8"}[weight_quant]
    assert re.search(r"loading: ready .*100/100", capsys.readouterr().err)
