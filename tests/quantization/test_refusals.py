"""Folders that cannot be served are refused with one line that says what is wrong; nothing is half read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import edit_config, edit_tensors, family_configs, make_model, save_model
from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.source import INDEX, TensorSource
from quantization.compressed_fixtures import Variant, write_compressed

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("float", "int8", "static", "sharded")}
    model = make_model(family_configs()["llama2"])
    save_model(model, folders["float"])
    save_model(model, folders["sharded"], max_shard_size="100KB")
    write_compressed(folders["int8"], Variant())
    write_compressed(folders["static"], Variant(activations="static"))
    return folders


@pytest.fixture
def copy(masters: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a good checkpoint to be spoilt."""
    return lambda name: Path(shutil.copytree(masters[name], tmp_path / name))


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_harness(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "edit", "message"),
    [
        ("float", lambda t: t.pop(f"{Q_PROJ}.weight"), f"no tensor {Q_PROJ}.weight"),
        ("float", lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(64)}), f"does not use: {Q_PROJ}.bias"),
        ("float", lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(64, 32)}), r"shape \[64, 32\].*\[64, 64\]"),
        ("float", lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(64, 64).to(torch.int8)}), "is int8, a float type"),
        ("int8", lambda t: t.pop(f"{Q_PROJ}.weight_scale"), f"no tensor {Q_PROJ}.weight_scale"),
        (
            "int8",
            lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(32, 1)}),
            r"weight_scale: has shape \[32, 1\]",
        ),
        ("int8", lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.zeros(64, 1)}), "finite and above zero"),
        (
            "int8",
            lambda t: t.update({f"{Q_PROJ}.weight": torch.ones(64, 64)}),
            "is float32, the quantization_config says int8",
        ),
        ("int8", lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(1)}), f"does not use: {Q_PROJ}.input_scale"),
        ("static", lambda t: t.pop(f"{Q_PROJ}.input_scale"), f"no tensor {Q_PROJ}.input_scale"),
        ("static", lambda t: t.update({f"{Q_PROJ}.input_scale": torch.ones(2)}), "a static scale per tensor"),
    ],
)
def test_tensors_that_do_not_fit(
    copy: Callable[[str], Path], kind: str, edit: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    folder = copy(kind)
    edit_tensors(folder, edit)
    _refused(folder, message)


def _weights(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda q: q["config_groups"]["group_0"]["weights"].update(values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda q: q.update(quant_method="gptq", bits=4), "GPTQ of 4 bits is not supported, only of 8"),
        (lambda q: q.update(quant_method="awq"), "AWQ"),
        (lambda q: q.update(quant_method="somequant"), "'somequant' checkpoints are not supported"),
        (lambda q: q.update(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported"),
        (lambda q: q.update(config_groups=[]), "config_groups: must be an object"),
        (lambda q: q.update(ignore=[1]), "ignore: must be a list of texts"),
        (lambda q: q.update(ignore=["re:("]), "is not a regular expression"),
        (lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config: 'sparse-24-bitmask'"),
        (lambda q: q.update(kv_cache_scheme={"type": "int", "num_bits": 8, "symmetric": False}), "asymmetric cache"),
        (_weights(num_bits=4), "int of 4 bits is not supported"),
        (_weights(type="complex"), "complex of 8 bits is not supported"),
        (_weights(strategy="block"), "strategy 'block'"),
        (_weights(strategy="group", group_size=None), "needs a group_size"),
    ],
)
def test_schemes_that_are_not_served(
    copy: Callable[[str], Path], edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = copy("int8")
    edit_config(folder, lambda raw: edit(raw["quantization_config"]))
    _refused(folder, message)


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle"),
        ("consolidated.00.pth", "is a pickle"),
        ("model.gguf", "model.gguf is a GGUF file.*WEIGHT_QUANT"),
        ("notes.txt", "neither model.safetensors nor"),
    ],
)
def test_folders_without_safetensors(copy: Callable[[str], Path], file_name: str, message: str) -> None:
    folder = copy("float")
    (folder / "model.safetensors").unlink()
    (folder / file_name).write_bytes(b"x")
    _refused(folder, message)


def test_broken_files_are_named(copy: Callable[[str], Path]) -> None:
    folder = copy("float")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    _refused(folder, "model.safetensors: cannot be read as safetensors")


def test_shards_are_read_as_one(masters: dict[str, Path]) -> None:
    assert (masters["sharded"] / INDEX).is_file()
    assert set(TensorSource(masters["sharded"]).names()) == set(TensorSource(masters["float"]).names())
    tokens = list(range(3, 20))
    whole, sharded = (load_harness(masters[name]).prefill(tokens, chunk=17) for name in ("float", "sharded"))
    assert torch.equal(whole, sharded)


@pytest.mark.parametrize(
    ("file_name", "message"),
    [
        ("../float/model.safetensors", "is not the name of a safetensors file in the folder"),
        ("/etc/passwd", "is not the name"),
        ("shard.bin", "is not the name"),
        ("absent.safetensors", "absent.safetensors is missing"),
    ],
)
def test_an_index_cannot_leave_the_folder(copy: Callable[[str], Path], file_name: str, message: str) -> None:
    folder = copy("sharded")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][f"{Q_PROJ}.weight"] = file_name
    (folder / INDEX).write_text(json.dumps(index))
    _refused(folder, message)


def test_tied_heads_and_old_buffers_may_stay_in_the_file(copy: Callable[[str], Path]) -> None:
    folder = copy("float")
    edit_config(folder, lambda raw: raw.update(tie_word_embeddings=True))
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(folder, lambda tensors: tensors.update(buffer))
    assert load_harness(folder).model.weight_scheme == "w8a16"
