"""Static scales of an int8 K/V cache: where checkpoints of different tools keep them. Runs while a model loads."""

from __future__ import annotations

from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import AttentionShape, scale_tensor, without_trunk
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import CacheScheme

# {m} is the attention module, {x} is k or v; newest spelling first
SPELLINGS = (
    "{m}.{x}_scale",
    "{m}.{x}_cache.scale",
    "{m}.{x}_proj.output_scale",
    "{m}.{x}_proj.{x}_scale",
    "{m}.kv_scale",  # one for both
)
# {t} is the attention module without its model's name for the trunk; maxima, not scales: only their reader uses them
MAXIMA = (
    "cachekv_scales.json:{t}.cache{x}_matmul.activation_quanter",
    "cachekv_scales.json:{t}.cache{x}_matmul.activation_quanter.zero_point",
)
PER_CHANNEL = "static scales per channel are not used: the cache takes one from each token and head"


def cache_scale_names(attention: str) -> list[str]:
    """Every name under which a scale of this attention module may be stored."""
    trunkless = without_trunk(attention)
    spellings = (*SPELLINGS, *MAXIMA)
    return list(dict.fromkeys(text.format(m=attention, t=trunkless, x=x) for text in spellings for x in ("k", "v")))


def read_cache_scales(source: TensorSource, attention: str, *, heads: AttentionShape, required: bool) -> CacheScheme:
    """K and V scales as [1] or [num_kv_heads] float32. Raises CheckpointError: missing, or of another shape."""
    k_scale = _read(source, attention, x="k")
    v_scale = _read(source, attention, x="v")
    if k_scale is None or v_scale is None:
        if k_scale is None and v_scale is None and not required:
            return CacheScheme()
        missing = "k" if k_scale is None else "v"
        raise CheckpointError(f"the checkpoint has no cache scale {SPELLINGS[0].format(m=attention, x=missing)}")
    return cache_scheme(attention, k_scale, v_scale, heads=heads)


def cache_scheme(attention: str, k_scale: Tensor, v_scale: Tensor, *, heads: AttentionShape) -> CacheScheme:
    """Scales of any shape as what the cache can use: static, or dynamic where they are per channel."""
    for x, scale in (("k", k_scale), ("v", v_scale)):
        if scale.numel() not in (1, heads.num_kv_heads, heads.num_kv_heads * heads.head_dim):
            raise CheckpointError(
                f"{attention}: its {x} cache scales have shape {list(scale.shape)}; one scale, one per K/V head "
                f"({heads.num_kv_heads}) or one per channel ({heads.num_kv_heads * heads.head_dim}) is needed"
            )
    if max(k_scale.numel(), v_scale.numel()) > heads.num_kv_heads:
        return CacheScheme(note=PER_CHANNEL)
    return CacheScheme(k_scale.reshape(-1), v_scale.reshape(-1))


def pass_over_cache_scales(source: TensorSource, attention: str, *, note: str = "") -> CacheScheme:
    """Count this module's scales as read: the cache does not use them. The note is kept if there are any."""
    names = [name for name in cache_scale_names(attention) if name in source]
    for name in names:
        source.pass_over(name)
    return CacheScheme(note=note if names else "")


def _read(source: TensorSource, attention: str, *, x: str) -> Tensor | None:
    for spelling in SPELLINGS:
        name = spelling.format(m=attention, x=x)
        if name in source:
            return scale_tensor(source, name)
    return None
