"""`octavo merge`: a LoRA adapter folded into a checkpoint, against peft where it is installed and by the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.tiny_checkpoints import VOCAB, edit_tensors, family_configs, make_model, save_model
from octavo.cli.main import main
from quantize.making import make, report, tensors, write_float

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def write_adapter(folder: Path, parts: dict[str, torch.Tensor] | None = None, **settings: Any) -> Path:
    """An adapter of rank 4 for two products, or of `parts` (names without the prefix)."""
    if parts is None:
        parts = {
            f"{Q}.lora_A.weight": draw(4, 64, seed=1),
            f"{Q}.lora_B.weight": draw(64, 4, seed=2),
            f"{UP}.lora_A.weight": draw(4, 64, seed=3),
            f"{UP}.lora_B.weight": draw(96, 4, seed=4),
        }
    folder.mkdir()
    save_file({f"base_model.model.{name}": part for name, part in parts.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(model: Path, lora: Path, out: Path) -> int:
    return main(["merge", "--model", str(model), "--lora", str(lora), "--out", str(out), "--quiet"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "float"
    write_float(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        ({}, (2.0, 2.0)),
        ({"use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"q_proj": 2}}, (0.5, 2.0)),
        ({"alpha_pattern": {r"layers\.1\..*up_proj": 1}}, (2.0, 0.25)),
    ],
)
def test_the_product_of_the_factors_is_added(
    model: Path, tmp_path: Path, settings: dict[str, Any], scales: tuple[float, float]
) -> None:
    lora = write_adapter(tmp_path / "lora", **settings)
    assert merge(model, lora, tmp_path / "out") == 0
    before, after, parts = tensors(model), tensors(tmp_path / "out"), load_file(lora / "adapter_model.safetensors")
    for module, scale in zip((Q, UP), scales):
        a, b = (parts[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        wanted = before[f"{module}.weight"].double() + scale * (b @ a)
        torch.testing.assert_close(after[f"{module}.weight"].double(), wanted, rtol=0, atol=1e-7)
    changed = {f"{module}.weight" for module in (Q, UP)}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name not in changed)
    assert not (tmp_path / "out.partial").exists()


def test_a_rank_of_its_own_for_one_module(model: Path, tmp_path: Path) -> None:
    parts = {f"{Q}.lora_A.weight": draw(2, 64, seed=1), f"{Q}.lora_B.weight": draw(64, 2, seed=2)}
    lora = write_adapter(tmp_path / "lora", parts, rank_pattern={"q_proj": 2})
    assert merge(model, lora, tmp_path / "out") == 0
    added = tensors(tmp_path / "out")[f"{Q}.weight"] - tensors(model)[f"{Q}.weight"]
    torch.testing.assert_close(added, 4 * parts[f"{Q}.lora_B.weight"] @ parts[f"{Q}.lora_A.weight"], rtol=0, atol=1e-6)


def test_modules_to_save_and_trained_biases_replace_what_was_there(tmp_path: Path) -> None:
    write_float(tmp_path / "float", family="qwen2")
    parts = {
        "lm_head.weight": draw(VOCAB, 64, seed=5),
        f"{Q}.bias": draw(64, seed=6),
        f"{Q}.lora_A.weight": draw(4, 64, seed=1),
        f"{Q}.lora_B.weight": draw(64, 4, seed=2),
    }
    lora = write_adapter(tmp_path / "lora", parts, modules_to_save=["lm_head"], bias="lora_only")
    assert merge(tmp_path / "float", lora, tmp_path / "out") == 0
    after = tensors(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], parts["lm_head.weight"])
    assert torch.equal(after[f"{Q}.bias"], parts[f"{Q}.bias"])


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    save_model(make_model(family_configs()["llama2"], dtype=torch.bfloat16), tmp_path / "float")
    lora = write_adapter(tmp_path / "lora")
    assert merge(tmp_path / "float", lora, tmp_path / "out") == 0
    before, after = tensors(tmp_path / "float")[f"{Q}.weight"], tensors(tmp_path / "out")[f"{Q}.weight"]
    assert after.dtype == torch.bfloat16
    added = 2 * draw(64, 4, seed=2) @ draw(4, 64, seed=1)
    torch.testing.assert_close(after, (before.float() + added).bfloat16(), rtol=0, atol=0)


def peft_configs() -> dict[str, dict[str, Any]]:
    products = ["q_proj", "v_proj", "down_proj"]
    return {
        "plain": {"target_modules": products},
        "rank_stabilised": {"target_modules": products, "use_rslora": True, "alpha_pattern": {"v_proj": 3}},
        "dora": {"target_modules": products, "use_dora": True},
        "ranks": {"target_modules": products, "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2}},
        "every_linear": {"target_modules": "all-linear"},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "head_saved": {"target_modules": products, "modules_to_save": ["lm_head"]},
        "biases": {"target_modules": products, "bias": "all"},
    }


@pytest.mark.parametrize("kind", peft_configs())
@pytest.mark.parametrize("family", ["llama2", "qwen2"])
def test_the_same_as_peft_merges(tmp_path: Path, kind: str, family: str) -> None:
    peft = pytest.importorskip("peft")
    model = write_float(tmp_path / "float", family=family)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **peft_configs()[kind])
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    wanted = adapted.merge_and_unload().state_dict()
    before = tensors(tmp_path / "float")
    assert merge(tmp_path / "float", tmp_path / "lora", tmp_path / "out") == 0
    made = tensors(tmp_path / "out")
    assert any(not torch.equal(made[name], before[name]) for name in made)
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_merged_can_be_quantised_and_served(model: Path, tmp_path: Path) -> None:
    assert merge(model, write_adapter(tmp_path / "lora"), tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    made = make(tmp_path / "out", "--no-ablation")
    assert report(made)["made"]["top1_agreement"] > 0.8


def test_files_are_cut_as_the_originals_are(tmp_path: Path) -> None:
    model = make_model(family_configs()["llama2"])
    model.save_pretrained(tmp_path / "float", max_shard_size="60KB")
    assert merge(tmp_path / "float", write_adapter(tmp_path / "lora"), tmp_path / "out") == 0
    names = sorted(path.name for path in (tmp_path / "float").glob("*.safetensors*"))
    assert len(names) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == names
    assert main(["inspect", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("settings", "parts", "reason"),
    [
        ({"peft_type": "IA3"}, None, "peft_type 'IA3' is not supported"),
        ({"lora_bias": True}, None, "lora_bias"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, None, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, None, "layer_replication"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights 'pissa' changes the base weights"),
        ({"r": 8}, None, "says rank 8"),
        ({"r": "four"}, None, "r must be a number above zero"),
        ({"lora_alpha": -1}, None, "lora_alpha must be a number above zero"),
        ({"alpha_pattern": {"(": 1}}, None, "is no regular expression"),
        ({"use_dora": True}, None, "do not agree"),
        ({}, {f"{Q}.lora_A.weight": draw(4, 64, seed=1)}, "only one of lora_A.weight and lora_B.weight"),
        ({}, {f"{Q}.lora_C.weight": draw(4, 64, seed=1)}, "is of a kind that is not supported"),
        ({}, {f"{Q}.bias": draw(64, seed=1)}, f"changes {Q}.bias, which the checkpoint does not have"),
        ({}, {"lm_head.weight": draw(VOCAB + 8, 64, seed=1)}, "lm_head.weight: has shape"),
        ({}, {"lm_head.weight": draw(VOCAB, 64, seed=1) / 0}, "needs finite values"),
        ({}, {"lm_head.weight": torch.ones(VOCAB, 64, dtype=torch.int8)}, "needs finite values of a float type"),
        ({}, {"x.lora_A.weight": draw(4, 64, seed=1), "x.lora_B.weight": draw(64, 4, seed=1)}, "changes x.weight"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, Any],
    parts: dict[str, torch.Tensor] | None,
    reason: str,
) -> None:
    assert merge(model, write_adapter(tmp_path / "lora", parts, **settings), tmp_path / "out") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert reason in lines[0]
    assert not (tmp_path / "out").exists()


def test_other_folders_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = write_adapter(tmp_path / "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert merge(model, lora, tmp_path / "full") == 1
    assert "exists and is not empty" in capsys.readouterr().err
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    assert merge(model, lora, tmp_path / "out") == 1
    assert "adapter_model.bin is a pickle" in capsys.readouterr().err
    assert merge(model, tmp_path / "none", tmp_path / "out") == 1
    assert "adapter_config.json: cannot be read" in capsys.readouterr().err
    write_float(tmp_path / "float")
    made = make(tmp_path / "float", "--no-ablation", out="int8")
    capsys.readouterr()
    assert merge(made, write_adapter(tmp_path / "lora2"), tmp_path / "out") == 1
    assert "is quantised" in capsys.readouterr().err


def test_the_head_of_a_tied_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_float(tmp_path / "float", family="llama3_tied")
    lora = write_adapter(tmp_path / "lora", {"lm_head.weight": draw(VOCAB, 64, seed=1)})
    assert merge(tmp_path / "float", lora, tmp_path / "out") == 1
    assert "the model's head is its embedding" in capsys.readouterr().err


def test_values_beyond_float16_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(make_model(family_configs()["llama2"], dtype=torch.float16), tmp_path / "float")
    edit_tensors(tmp_path / "float", lambda stored: stored[f"{Q}.weight"].fill_(65000.0))
    lora = write_adapter(tmp_path / "lora", lora_alpha=900000)
    assert merge(tmp_path / "float", lora, tmp_path / "out") == 1
    assert f"{Q}.weight: its changed values do not fit into float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
