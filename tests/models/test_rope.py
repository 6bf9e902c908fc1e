"""The table of cosines and sines: each entry is rounded from the float64 cosine of a float32 angle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.first_calls import settle
from octavo.kernels.reference import ReferenceKernels
from octavo.models.config import parse_config
from octavo.models.rope import attention_factor, cos_sin_table, inverse_frequencies
from octavo.models.rope_config import RopeConfig

NUM_POSITIONS = 10_000
POSITIONS = (0, 1, 2, 63, 64, 1000, 4095, 4096, 4097, 8191, 8192, 8193, 9999)
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    **{"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1},
    **{"intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 16384, "rms_norm_eps": 1e-5},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def rope_of(scaling: dict[str, object] | None) -> RopeConfig:
    return parse_config({**LLAMA, "rope_theta": 10000.0, "rope_scaling": scaling}).rope


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
def test_each_entry_is_rounded_from_float64(scaling: dict[str, object] | None) -> None:
    rope = rope_of(scaling)
    table = cos_sin_table(rope, num_positions=NUM_POSITIONS)
    assert (table.shape, table.dtype) == ((NUM_POSITIONS, rope.rotary_dim), torch.float32)
    frequencies, factor = inverse_frequencies(rope).numpy(), np.float32(attention_factor(rope))
    for position in POSITIONS:
        angles = [float(np.float32(position) * frequency) for frequency in frequencies]
        exact = [np.float32(function(angle)) * factor for function in (math.cos, math.sin) for angle in angles]
        assert table[position].tolist() == [float(value) for value in exact]


def test_a_short_table_is_the_beginning_of_a_long_one() -> None:
    rope = rope_of(None)
    assert torch.equal(cos_sin_table(rope, num_positions=4097), cos_sin_table(rope, num_positions=9000)[:4097])


def test_the_reference_settles_torchs_functions_before_it_computes() -> None:
    settle.cache_clear()
    ReferenceKernels()
    assert settle.cache_info().misses == 1
