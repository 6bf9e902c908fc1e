"""Spoilt checkpoints of every format: each is one CheckpointError that names the tensor or file, never a crash."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.harness import load_harness
from models.tiny_checkpoints import edit_config, edit_tensors, family_configs, make_model, save_model
from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.source import INDEX, SINGLE
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

Q = "model.layers.0.self_attn.q_proj"
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def masters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("float", "sharded", "smooth", "fp8", "gptq", "absmax")}
    model = make_model(family_configs()["llama2"])
    save_model(model, folders["float"])
    save_model(model, folders["sharded"], max_shard_size="100KB")
    write_model(folders["smooth"], smooth_quant_linear, SMOOTH_QUANT)
    write_model(folders["fp8"], fp8_linear(per_row=True, static=True), fp8_config("static"))
    write_model(folders["gptq"], gptq_linear(group_size=32), gptq_config(group_size=32))
    write_absmax(folders["absmax"], store_int8=True)
    for name, variant in VARIANTS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        write_compressed(folders[name], variant)
    return folders


VARIANTS = {
    "static": Variant(activations="static_asymmetric"),
    "packed": Variant(format="pack-quantized"),
    "asymmetric": Variant(symmetric=False),
}


def tensor(name: str, value: Tensor | None) -> Spoil:
    """Replace one tensor, or take it out."""

    def edit(tensors: dict[str, Tensor]) -> None:
        assert name in tensors or value is not None
        tensors.pop(name) if value is None else tensors.update({name: value})

    return lambda folder: edit_tensors(folder, edit)


def value(name: str, number: float) -> Spoil:
    """Put one number into a tensor."""

    def edit(tensors: dict[str, Tensor]) -> None:
        changed = tensors[name].float().reshape(-1)
        changed[-1] = number
        tensors[name] = changed.reshape(tensors[name].shape).to(tensors[name].dtype)

    return lambda folder: edit_tensors(folder, edit)


def config(**values: Any) -> Spoil:
    return lambda folder: edit_config(folder, lambda raw: raw.update(values))


def quantization(**values: Any) -> Spoil:
    return lambda folder: edit_config(folder, lambda raw: raw["quantization_config"].update(values))


def text(name: str, content: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def header(entries: dict[str, Any] | bytes, data: bytes = b"") -> Spoil:
    """A safetensors file with a header of one's own."""
    raw = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return text(SINGLE, struct.pack("<Q", len(raw)) + raw + data)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def cut(name: str, *, keep: float) -> Spoil:
    def spoil(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(len(raw) * keep)])

    return spoil


def index_entry(name: str, file_name: str | None) -> Spoil:
    def spoil(folder: Path) -> None:
        raw = json.loads((folder / INDEX).read_text())
        raw["weight_map"].pop(name, None)
        if file_name is not None:
            raw["weight_map"][name] = file_name
        (folder / INDEX).write_text(json.dumps(raw))

    return spoil


def link_out(name: str) -> Spoil:
    """The file becomes a link to a copy beside the folder."""

    def spoil(folder: Path) -> None:
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return spoil


def other_kind(name: str) -> Spoil:
    """No safetensors, but a file of another kind."""

    def spoil(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / name).write_bytes(b"x")

    return spoil


def shards_without_index(*numbers: int) -> Spoil:
    def spoil(folder: Path) -> None:
        for number in numbers:
            shutil.copy(folder / SINGLE, folder / f"model-{number:05}-of-00003.safetensors")
        (folder / SINGLE).unlink()

    return spoil


def numbers(name: str, edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        raw = json.loads((folder / name).read_text())
        edit(raw)
        (folder / name).write_text(json.dumps(raw))

    return spoil


def twice(folder: Path) -> None:
    save_file({f"{Q}.weight": torch.ones(64, 64)}, folder / "kv_cache_scales.safetensors")


def cache_scales(k: Tensor | float | None, v: Tensor | float | None, *, spelling: str = "{x}_scale") -> Spoil:
    """Scales of the first layer's cache, and good ones of the second's."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for layer, values in enumerate(((k, v), (1.0, 1.0))):
            for x, given in zip("kv", values):
                if given is not None:
                    scale = given if isinstance(given, Tensor) else torch.tensor([given])
                    tensors[f"model.layers.{layer}.self_attn.{spelling.format(x=x)}"] = scale

    return lambda folder: edit_tensors(folder, edit)


def half_cache_file(folder: Path) -> None:
    save_file({"model.layers.0.self_attn.k_cache.scale": torch.ones(1)}, folder / "kv_cache_scales.safetensors")
    cut("kv_cache_scales.safetensors", keep=0.5)(folder)


def nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


ATTENTION = "model.layers.0.self_attn"
ABSMAX_Q = "llama.layers.0.self_attn.q_proj"
CASES: list[tuple[str, Spoil, str]] = [
    # files
    ("float", cut(SINGLE, keep=0.9), r"^model\.safetensors: cannot be read"),
    ("float", cut(SINGLE, keep=0.001), r"^model\.safetensors: cannot be read"),
    ("float", text(SINGLE, b""), r"^model\.safetensors: cannot be read"),
    ("float", text(SINGLE, struct.pack("<Q", 1 << 60)), r"^model\.safetensors: cannot be read"),
    ("float", text(SINGLE, b"\x80\x04\x95" * 100), r"^model\.safetensors: cannot be read"),  # a pickle by another name
    ("float", header(b"{" * 100_000), r"^model\.safetensors: cannot be read"),
    ("float", header({"a": entry([1 << 62, 8], 0, 4)}, b"1234"), r"^model\.safetensors: cannot be read"),
    ("float", header({"a": entry([1 << 40], 0, 1 << 42)}, b"1234"), r"^model\.safetensors: cannot be read"),
    ("float", header({"a": entry([-1], 0, 4)}, b"1234"), r"^model\.safetensors: cannot be read"),
    (
        "float",
        header({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234"),
        r"^model\.safetensors: cannot be read",
    ),
    (
        "float",
        header(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
        ),
        r"^model\.safetensors: cannot be read",
    ),
    ("float", header({"model.embed_tokens.weight": entry([2], 0, 1, "F4")}, b"1"), "float4.*not supported"),
    ("float", other_kind("pytorch_model.bin"), r"pytorch_model\.bin is a pickle.*safetensors"),
    ("float", other_kind("consolidated.00.pth"), r"consolidated\.00\.pth is a pickle"),
    ("float", other_kind("model_state.pdparams"), r"model_state\.pdparams is a pickle of Paddle"),
    ("float", other_kind("model.pdmodel"), r"model\.pdmodel is a Paddle static graph.*Hugging Face folder"),
    ("float", other_kind("model-Q8_0.gguf"), r"model-Q8_0\.gguf is a GGUF file.*WEIGHT_QUANT"),
    ("float", link_out(SINGLE), r"^model\.safetensors: is a link out of the model folder"),
    ("float", link_out("config.json"), r"^config\.json: is a link out of the model folder"),
    ("sharded", link_out(INDEX), r"index\.json: is a link out of the model folder"),
    ("absmax", link_out("act_scales.json"), r"^act_scales\.json: is a link out of the model folder"),
    ("float", shards_without_index(1, 3), r"model-00002-of-00003\.safetensors is missing"),
    ("float", twice, rf"{Q}\.weight is in both model\.safetensors and kv_cache_scales\.safetensors"),
    ("sharded", link_out("model-00001-of-00004.safetensors"), r"^model-00001-of-00004\.safetensors: is a link out"),
    # the index
    ("sharded", index_entry(f"{Q}.weight", None), rf"has no entry for {Q}\.weight"),
    ("sharded", index_entry(f"{Q}.bias", "model-00001-of-00004.safetensors"), rf"says that {Q}\.bias is in"),
    ("sharded", index_entry(f"{Q}.weight", "../x.safetensors"), "'../x.safetensors' is not the name"),
    ("sharded", index_entry(f"{Q}.weight", "/etc/hostname"), "'/etc/hostname' is not the name"),
    ("sharded", index_entry(f"{Q}.weight", "gone.safetensors"), r"gone\.safetensors is missing"),
    ("sharded", text(INDEX, "[]"), r"index\.json: must be a JSON object"),
    ("sharded", text(INDEX, '{"weight_map": {}}'), r"index\.json: must be a JSON object with a weight_map"),
    ("sharded", text(INDEX, '{"weight_map": ' + '{"a":' * 100_000), r"index\.json: cannot be read as JSON"),
    # the configuration
    ("float", text("config.json", "{"), r"^config\.json: cannot be read as JSON"),
    ("float", text("config.json", b"\xff\xfe{}"), r"^config\.json: cannot be read as JSON"),
    ("float", nested, r"^config\.json: cannot be read as JSON"),
    ("float", text("config.json", '{"a": "' + "x" * (17 << 20) + '"}'), r"^config\.json: larger than"),
    ("float", config(hidden_size=1 << 30), "has shape"),
    ("float", config(num_hidden_layers=1 << 30), r"^config\.json: num_hidden_layers must be"),
    ("float", config(num_hidden_layers=3), r"no tensor model\.layers\.2\."),
    ("float", config(quantization_config=[1]), r"^config\.json: quantization_config must be"),
    ("float", config(quantization_config={"quant_method": 8}), "quant_method: must be a text"),
    ("float", config(quantization_config={"load_in_8bit": True}), "bitsandbytes.*not supported.*WEIGHT_QUANT"),
    ("float", config(quantization_config={"quant_method": "awq", "bits": 4}), "AWQ.*WEIGHT_QUANT"),
    # float tensors
    (
        "float",
        value("model.embed_tokens.weight", float("nan")),
        r"embed_tokens\.weight: has values that are not finite",
    ),
    ("float", value(f"{Q}.weight", float("nan")), rf"^{Q}\.weight: has values that are not finite"),
    ("float", value(f"{Q}.weight", float("-inf")), rf"^{Q}\.weight: has values that are not finite"),
    ("float", value("lm_head.weight", float("inf")), r"^lm_head\.weight: has values that are not finite"),
    ("float", value("model.norm.weight", float("nan")), r"^model\.norm\.weight: has values that are not finite"),
    ("float", tensor("model.norm.weight", torch.ones(64, dtype=torch.int8)), r"^model\.norm\.weight: is int8"),
    ("float", tensor("model.norm.weight", torch.ones(64, 1)), r"^model\.norm\.weight: has shape \[64, 1\]"),
    ("float", tensor("a\n\x1b[31mb", torch.ones(1)), r"does not use: a  \[31mb$"),
    # scales of the cache
    ("float", cache_scales(float("nan"), 1.0), rf"^{ATTENTION}\.k_scale: every scale must be finite and above zero"),
    ("float", cache_scales(1.0, float("inf")), rf"^{ATTENTION}\.v_scale: every scale"),
    ("smooth", cache_scales(0.0, 1.0), rf"^{ATTENTION}\.k_scale: every scale"),
    ("smooth", cache_scales(1.0, -1.0, spelling="{x}_proj.output_scale"), r"v_proj\.output_scale: every scale"),
    ("float", cache_scales(1.0, None), rf"has no cache scale {ATTENTION}\.v_scale"),
    ("float", cache_scales(torch.ones(3), torch.ones(3)), rf"^{ATTENTION}: its k cache scales have shape \[3\]"),
    ("float", cache_scales(torch.tensor([1]), torch.tensor([1])), rf"^{ATTENTION}\.k_scale: is int64"),
    ("float", cache_scales(1.0, 1.0, spelling="{x}_scales"), r"does not use: .*self_attn\.k_scales and 3 more"),
    ("float", half_cache_file, r"^kv_cache_scales\.safetensors: cannot be read"),
    # smooth_quant
    ("smooth", tensor(f"{Q}.scale", None), rf"no tensor {Q}\.scale"),
    ("smooth", value(f"{Q}.scale", float("nan")), rf"^{Q}\.scale: every scale"),
    ("smooth", value(f"{Q}.scale", 0.0), rf"^{Q}\.scale: every scale"),
    ("smooth", value(f"{Q}.scale", -1.0), rf"^{Q}\.scale: every scale"),
    ("smooth", value(f"{Q}.scale", 1e-45), rf"^{Q}\.scale: every scale"),
    ("smooth", tensor(f"{Q}.scale", torch.ones(64, dtype=torch.int32)), rf"^{Q}\.scale: is int32"),
    ("smooth", tensor(f"{Q}.scale", torch.ones(1, 64)), rf"^{Q}\.scale: has shape \[1, 64\]"),
    ("smooth", tensor(f"{Q}.weight", torch.ones(64, 64)), rf"^{Q}\.weight: is float32, .* int8"),
    ("smooth", quantization(quant_dtype="int4"), "quant_dtype: must be one of"),
    # fp8
    ("fp8", tensor(f"{Q}.weight_scale", None), rf"no tensor {Q}\.weight_scale"),
    ("fp8", tensor(f"{Q}.input_scale", None), rf"no tensor {Q}\.input_scale"),
    ("fp8", value(f"{Q}.input_scale", float("inf")), rf"^{Q}\.input_scale: every scale"),
    ("fp8", tensor(f"{Q}.weight_scale", torch.ones(2, 2)), rf"^{Q}\.weight_scale: has shape \[2, 2\]"),
    ("fp8", tensor(f"{Q}.weight_scale_inv", torch.ones(1, 1)), rf"^{Q}\.weight_scale_inv: fp8 .* per block"),
    ("fp8", value(f"{Q}.weight", float("nan")), rf"^{Q}\.weight: has values that are not finite"),
    ("fp8", tensor(f"{Q}.weight", torch.ones(64, 64).to(torch.float8_e5m2)), rf"^{Q}\.weight: is float8_e5m2"),
    ("fp8", quantization(weight_block_size=[128, 128]), "weight_block_size: fp8 .* per block"),
    ("fp8", quantization(activation_scheme="dynamic"), r"does not use: .*\.input_scale and 13 more"),
    ("fp8", quantization(activation_scheme=None), "activation_scheme: must be static or dynamic"),
    ("fp8", quantization(ignored_layers=["re:*"]), "is not a regular expression"),
    ("fp8", quantization(ignored_layers="lm_head"), "ignored_layers: must be a list of texts"),
    ("fp8", quantization(ignored_layers=[Q]), rf"^{Q}\.weight: is float8_e4m3fn, a float type"),
    # GPTQ
    ("gptq", quantization(bits=4), "GPTQ of 4 bits is not supported, only of 8"),
    ("gptq", quantization(checkpoint_format="marlin"), "checkpoint_format: must be gptq or gptq_v2: 'marlin'"),
    ("gptq", tensor(f"{Q}.qzeros", None), rf"no tensor {Q}\.qzeros"),
    ("gptq", tensor(f"{Q}.qweight", torch.ones(8, 64, dtype=torch.int32)), rf"^{Q}\.qweight: has shape \[8, 64\]"),
    ("gptq", tensor(f"{Q}.qweight", torch.ones(16, 64)), rf"^{Q}\.qweight: packed values are float32"),
    ("gptq", tensor(f"{Q}.scales", torch.ones(2, 32)), rf"^{Q}\.scales: has shape \[2, 32\]"),
    ("gptq", value(f"{Q}.scales", float("nan")), rf"^{Q}\.scales: every scale"),
    ("gptq", value(f"{Q}.g_idx", 2), rf"^{Q}\.g_idx: names groups outside 0 to 1"),
    ("gptq", value(f"{Q}.g_idx", -1), rf"^{Q}\.g_idx: names groups outside 0 to 1"),
    ("gptq", tensor(f"{Q}.bias", torch.ones(64)), rf"^{Q}\.bias: the model has no such bias"),
    # A8W8C8
    ("absmax", text("act_scales.json", "{"), r"^act_scales\.json: cannot be read as JSON"),
    ("absmax", numbers("weight_scales.json", lambda raw: raw.update({f"{ABSMAX_Q}.weight_quanter": "x"})), "a number"),
    (
        "absmax",
        numbers("weight_scales.json", lambda raw: raw.pop(f"{ABSMAX_Q}.weight_quanter")),
        rf"^{Q}\.weight: is int8",
    ),
    (
        "absmax",
        numbers("weight_scales.json", lambda raw: raw.update({f"{ABSMAX_Q}.weight_quanter": [1.0, 2.0]})),
        "has 2 values, the weight has 64 rows",
    ),
    (
        "absmax",
        numbers("act_scales.json", lambda raw: raw.update({f"{ABSMAX_Q}.activation_quanter": 0.0})),
        r"act_scales\.json:layers\.0\.self_attn\.q_proj\.activation_quanter: every scale",
    ),
    (
        "absmax",
        numbers("act_scales.json", lambda raw: raw.update({f"{ABSMAX_Q}.activation_quanter": 10**400})),
        r"act_scales\.json: .*too large",
    ),
    (
        "absmax",
        numbers(
            "cachekv_scales.json", lambda raw: raw.pop("llama.layers.0.self_attn.cachek_matmul.activation_quanter")
        ),
        r"cachekv_scales\.json: has only one of K and V",
    ),
    ("absmax", text("weight_scales_1.json", "{}"), r"weight_scales_1\.json: scales of several ranks"),
    # compressed-tensors
    ("static", tensor(f"{Q}.input_zero_point", torch.zeros(2, dtype=torch.int8)), rf"^{Q}\.input_zero_point: must be"),
    ("static", tensor(f"{Q}.input_zero_point", torch.tensor([300])), rf"^{Q}\.input_zero_point: .* \[-128, 127\]"),
    ("static", tensor(f"{Q}.input_zero_point", torch.tensor([float("nan")])), rf"^{Q}\.input_zero_point: must be"),
    ("asymmetric", tensor(f"{Q}.weight_zero_point", torch.full((64, 1), 1000)), rf"^{Q}\.weight_zero_point: .* 127\]"),
    ("packed", tensor(f"{Q}.weight_shape", torch.tensor(64)), rf"^{Q}\.weight_shape: has shape \[\]"),
    ("packed", tensor(f"{Q}.weight_packed", torch.ones(64, 16)), rf"^{Q}: packed values are float32"),
]


@pytest.mark.parametrize(("kind", "spoil", "message"), CASES, ids=[f"{i}-{kind}" for i, (kind, *_) in enumerate(CASES)])
def test_a_spoilt_checkpoint_is_one_clear_error(
    masters: dict[str, Path], tmp_path: Path, kind: str, spoil: Spoil, message: str
) -> None:
    folder = Path(shutil.copytree(masters[kind], tmp_path / kind))
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_harness(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 602


def test_the_masters_themselves_are_served(masters: dict[str, Path]) -> None:
    assert {name: load_harness(folder).model.weight_scheme for name, folder in masters.items()} == {
        "float": "w8a16",
        "sharded": "w8a16",
        "smooth": "w8a8",
        "fp8": "w8a16 from fp8",
        "gptq": "w8a16",
        "absmax": "w8a8",
        "static": "w8a8",
        "packed": "w8a16",
        "asymmetric": "w8a16",
    }


def test_sizes_that_no_kernel_serves_are_named(tmp_path: Path) -> None:
    write_compressed(tmp_path, Variant(strategy="group", group_size=2))
    with pytest.raises(CheckpointError, match=r"layers\.0\..*groups of 2 inputs are not served"):
        load_harness(tmp_path)


def test_links_inside_the_folder_and_into_the_hub_cache_are_followed(masters: dict[str, Path], tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", SINGLE):
        shutil.copy(masters["float"] / name, blobs / f"blob-{name}")
        os.symlink(f"../../blobs/blob-{name}", snapshot / name)
    assert load_harness(snapshot).model.weight_scheme == "w8a16"
    inner = Path(shutil.copytree(masters["float"], tmp_path / "inner"))
    (inner / "..data").mkdir()
    (inner / SINGLE).rename(inner / "..data" / SINGLE)
    os.symlink(f"..data/{SINGLE}", inner / SINGLE)
    assert load_harness(inner).model.weight_scheme == "w8a16"
