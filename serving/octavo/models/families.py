"""The architectures that are served: how each names its tensors and reads its settings. A table, no code per model.

Read by every process; imports no torch. Knows nothing of values: those are in `config.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from octavo.quantization.errors import CheckpointError


@dataclass(frozen=True)
class LayerNames:
    """Names inside `Family.layer`; a product's name stands without `.weight`."""

    attention: str = "self_attn"
    # three products, or one whose rows are interleaved by K/V head
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{expert}"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str = "mlp.shared_expert"
    shared_gate: str = "mlp.shared_expert_gate"


@dataclass(frozen=True)
class Family:
    """What one architecture has. A bias is True, False, or the name of the configuration's switch for it."""

    layer: str = "model.layers.{layer}"
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head"
    names: LayerNames = field(default_factory=LayerNames)
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    window: str = "none"  # none; all: every layer where sliding_window is set; switch: Qwen's use_sliding_window
    moe: bool = False
    ignored: tuple[str, ...] = (r"(.*\.)?rotary_emb\.inv_freq",)  # patterns of tensors that nobody needs


LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
MISTRAL = Family(window="all")
QWEN2 = Family(qkv_bias=True, window="switch")
QWEN3 = Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True, window="switch")
INTERNLM2 = Family(
    embedding="model.tok_embeddings.weight",
    head="output",
    names=LayerNames(
        attention="attention",
        qkv=("attention.wqkv",),
        out="attention.wo",
        input_norm="attention_norm",
        mlp_norm="ffn_norm",
        gate="feed_forward.w1",
        up="feed_forward.w3",
        down="feed_forward.w2",
    ),
    qkv_bias="bias",
    out_bias="bias",
)
INTERNLM3 = Family(qkv_bias="qkv_bias", out_bias="bias", mlp_bias="bias")
MIXTRAL_NAMES = LayerNames(
    router="block_sparse_moe.gate", expert="block_sparse_moe.experts.{expert}", expert_parts=("w1", "w3", "w2")
)

FAMILIES: dict[str, Family] = {
    "InternLM2ForCausalLM": INTERNLM2,
    "InternLM3ForCausalLM": INTERNLM3,
    "LlamaForCausalLM": LLAMA,  # Llama 2 and 3, Yi, Vicuna, and many more
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": replace(MISTRAL, names=MIXTRAL_NAMES, moe=True),
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": replace(QWEN2, moe=True),
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": replace(QWEN3, moe=True),
    "YiForCausalLM": replace(LLAMA, names=LayerNames(input_norm="ln1", mlp_norm="ln2")),  # before it became a Llama
}


def find_family(config: Mapping[str, object]) -> tuple[str, Family]:
    """The architecture's name and family. Raises CheckpointError with the list of known ones."""
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError("config.json: architectures: must be a list with the architecture's name")
    name = architectures[0]
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"config.json: architecture {name!r} is not supported (supported: {known})")
    return name, FAMILIES[name]
