"""config.json: both spellings of rope, windows, biases, end tokens, and refusals in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.models.config import load_config, parse_config
from octavo.models.rope import attention_factor, inverse_frequencies
from octavo.quantization.errors import CheckpointError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
}


def test_missing_fields_take_the_usual_defaults() -> None:
    config = parse_config(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.context_length) == (4, 16, 4096)
    assert (config.rope.kind, config.rope.theta, config.rope.rotary_dim) == ("default", 10000.0, 16)
    assert config.windows == (None,) * 4
    assert not config.tie_word_embeddings
    assert not config.qkv_bias


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_in_both_spellings_matches_transformers(kind: str) -> None:
    values = SCALINGS[kind]
    old = parse_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": kind, **values}})
    new = parse_config({**LLAMA, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **values}})
    assert old.rope == new.rope
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=4096, rope_theta=5e5,
        rope_scaling={"rope_type": kind, **values},
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](theirs, device=torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(old.rope), frequencies, rtol=1e-6, atol=0)
    assert attention_factor(old.rope) == pytest.approx(factor)


def test_context_grows_where_the_configuration_gives_the_length_before_scaling() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert parse_config({**LLAMA, "rope_scaling": yarn}).context_length == 16384
    linear = {"type": "linear", "factor": 4.0}
    assert parse_config({**LLAMA, "rope_scaling": linear, "max_sequence_length": 16384}).context_length == 16384
    dynamic = {"type": "dynamic", "factor": 6.0}
    assert parse_config({**LLAMA, "rope_scaling": dynamic}).context_length == 4096


@pytest.mark.parametrize(
    ("architecture", "fields", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 8}, (None,) * 4),
        ("MistralForCausalLM", {"sliding_window": 8}, (8,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 8, "use_sliding_window": False}, (None,) * 4),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 3},
            (None,) * 3 + (8,),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_follow_each_familys_rule(
    architecture: str, fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert parse_config({**LLAMA, **fields, "architectures": [architecture]}).windows == windows


def test_qwen2_has_qkv_biases_alone() -> None:
    config = parse_config({**LLAMA, "architectures": ["Qwen2ForCausalLM"]})
    assert (config.qkv_bias, config.out_bias, config.mlp_bias) == (True, False, False)


def test_end_tokens_are_those_of_both_files() -> None:
    config = parse_config({**LLAMA, "eos_token_id": 2}, generation={"eos_token_id": [9, 2, 100]})
    assert config.end_token_ids == (9, 2)  # 100 is outside the vocabulary


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported .*LlamaForCausalLM"),
        ({"architectures": None}, "architectures"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number .* got str 64"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"torch_dtype": "float64"}, "dtype 'float64'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": -1}}, "factor must be a number above zero"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"quantization_config": [1]}, "quantization_config must be an object"),
    ],
)
def test_bad_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_config({**LLAMA, **change})
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_and_bad_json_are_clear(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_config(tmp_path)


def test_a_configuration_elsewhere_is_read(tmp_path: Path) -> None:
    elsewhere = tmp_path / "other.json"
    elsewhere.write_text(json.dumps(LLAMA))
    assert load_config(tmp_path / "model", config_path=elsewhere).vocab_size == 100


def test_reading_a_configuration_needs_no_torch() -> None:
    code = "import sys; import octavo.models.config; sys.exit('torch' in sys.modules)"
    serving = Path(__file__).resolve().parents[2] / "serving"
    assert subprocess.run([sys.executable, "-c", code], cwd=serving, timeout=60).returncode == 0
