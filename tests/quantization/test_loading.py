"""Loading: what it takes in memory, what it logs, and what `octavo inspect` prints of it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import edit_tensors, family_configs, make_model, save_model
from octavo.cli.main import main
from octavo.quantization.scheme import dequantize, quantize_per_channel
from quantization import peak_memory
from quantization.format_fixtures import (
    SMOOTH_QUANT,
    fp8_config,
    fp8_linear,
    gptq_config,
    gptq_linear,
    smooth_quant_linear,
    write_model,
)

Q = "model.layers.0.self_attn.q_proj"


def _plain(_name: str, weight: Tensor, _largest: float) -> tuple[dict[str, Tensor], Tensor]:
    return {"weight": weight.bfloat16()}, weight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("writer", "quantization", "num_layers"),
    [
        (_plain, None, 20),
        (smooth_quant_linear, SMOOTH_QUANT, 20),
        (fp8_linear(per_row=True, static=False), fp8_config("dynamic"), 20),
        (gptq_linear(group_size=128), gptq_config(group_size=128), 20),
        (smooth_quant_linear, SMOOTH_QUANT, 75),
    ],
    ids=["bfloat16", "smooth_quant", "fp8", "gptq", "a gigabyte"],
)
def test_peak_memory_is_little_more_than_what_stays(
    tmp_path: Path, writer: Any, quantization: Any, num_layers: int
) -> None:
    peak_memory.write_large(tmp_path, writer, quantization, num_layers=num_layers)
    command = [sys.executable, peak_memory.__file__, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    output = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, timeout=300).stdout
    peak, stays = map(int, output.split())
    assert stays > num_layers * 10 << 20
    assert peak <= 1.15 * stays


def _inspect(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["inspect", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_inspect_prints_a_line_per_product_and_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path, fp8_linear(per_row=True, static=True), fp8_config("static"))
    code, out, _ = _inspect(capsys, str(tmp_path))
    assert code == 0
    lines = out.splitlines()
    line = next(line for line in lines if line.startswith(f"{Q} "))
    for part in (
        "64x64",
        "float8_e4m3fn",
        "int8 per channel",
        "two int8 per token",
        "weight, weight_scale, input_scale",
    ):
        assert part in line
    assert sum("_proj " in line for line in lines) == 14
    assert sum("cache int8 dynamic" in line for line in lines) == 2
    assert "fp8 input scale is not used" in out
    assert "tokens of cache fit" in out


def test_inspect_says_the_same_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(family_configs()["llama2"])
    save_model(model, tmp_path)
    scales = {f"model.layers.{layer}.self_attn.{x}_scale": torch.tensor([0.05]) for layer in range(2) for x in "kv"}
    edit_tensors(tmp_path, lambda tensors: tensors.update(scales))
    code, out, _ = _inspect(capsys, str(tmp_path), "--json", "--weight-quant", "a8w8")
    found = json.loads(out)
    assert code == 0
    product = next(item for item in found["products"] if item["name"] == Q)
    weight = model.get_submodule(Q).weight.detach()
    lost = (dequantize(quantize_per_channel(weight)) - weight).norm() / weight.norm()
    assert product["loss"] == pytest.approx(float(lost), rel=1e-3)
    assert (product["weight"], product["activation"]) == ("int8 per channel", "int8 per token")
    assert product["num_bytes"] == 64 * 64 + 64 * 4
    assert found["caches"][1]["scheme"] == "int8 static"
    assert found["caches"][1]["tensors"] == ["model.layers.1.self_attn.k_scale", "model.layers.1.self_attn.v_scale"]
    assert found["num_bytes"] == found["float_bytes"] + sum(item["num_bytes"] for item in found["products"])
    # two layers of K and V: 2 heads of 16 values and a scale
    assert found["fit"]["cache_bytes_per_token"] == 2 * 2 * 2 * (16 + 4)
    assert found["fit"]["cache_tokens"] % 64 == 0
    assert found["fit"]["cache_tokens"] > 0


def test_inspect_of_a_bad_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_model(family_configs()["llama2"]), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{Q}.weight"))
    code, out, err = _inspect(capsys, str(tmp_path))
    assert (code, out) == (1, "")
    assert err == f"octavo: error: the checkpoint has no tensor {Q}.weight\n"


def test_inspect_says_when_it_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_model(family_configs()["llama2"]), tmp_path)
    monkeypatch.setenv("BLOCK_BS", "0.01")
    code, out, _ = _inspect(capsys, str(tmp_path))
    assert code == 0
    assert "0 tokens of cache fit" in out
    assert "does not fit: BLOCK_BS" in out


def test_a_start_logs_one_line_and_the_table_for_debugging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_model(tmp_path, smooth_quant_linear, SMOOTH_QUANT)
    with caplog.at_level(logging.DEBUG, logger="octavo.models.loader"):
        load_harness(tmp_path)
    info = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert len(info) == 1
    assert info[0].startswith("weights: w8a8, 15 products, ")
    debug = [record.getMessage() for record in caplog.records if record.levelno == logging.DEBUG]
    assert Q in debug[0]


def test_experts_share_a_line_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_model(family_configs()["mixtral"]), tmp_path)
    _, out, _ = _inspect(capsys, str(tmp_path))
    assert sum("experts.(4).w1" in line for line in out.splitlines()) == 2
