"""Static scales of an int8 K/V cache: where checkpoints of different tools keep them. Runs while a model loads."""

from __future__ import annotations

from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import scale_tensor
from octavo.quantization.formats.source import TensorSource
from octavo.quantization.scheme import CacheScheme

# {m} is the attention module, {x} is k or v; newest spelling first
SPELLINGS = ("{m}.{x}_scale", "{m}.{x}_cache.scale", "{m}.{x}_proj.output_scale", "{m}.{x}_proj.{x}_scale")


def cache_scale_names(attention: str) -> list[str]:
    """Every name under which a scale of this attention module may be stored."""
    return [spelling.format(m=attention, x=x) for spelling in SPELLINGS for x in ("k", "v")]


def read_cache_scales(source: TensorSource, attention: str, *, num_kv_heads: int, required: bool) -> CacheScheme:
    """K and V scales as [1] or [num_kv_heads] float32. Raises CheckpointError: missing, or of another shape."""
    k_scale = _read(source, attention, x="k", num_kv_heads=num_kv_heads)
    v_scale = _read(source, attention, x="v", num_kv_heads=num_kv_heads)
    if (k_scale is None) != (v_scale is None) or (required and k_scale is None):
        missing = "k" if k_scale is None else "v"
        raise CheckpointError(f"the checkpoint has no cache scale {SPELLINGS[0].format(m=attention, x=missing)}")
    return CacheScheme(k_scale, v_scale)


def pass_over_cache_scales(source: TensorSource, attention: str) -> None:
    """Count this module's scales as read: the cache does not use them."""
    for name in cache_scale_names(attention):
        source.pass_over(name)


def _read(source: TensorSource, attention: str, *, x: str, num_kv_heads: int) -> Tensor | None:
    for spelling in SPELLINGS:
        name = spelling.format(m=attention, x=x)
        if name in source:
            scale = scale_tensor(source, name)
            if scale.numel() not in (1, num_kv_heads):
                raise CheckpointError(
                    f"{name}: has shape {list(scale.shape)}; one scale or one per K/V head ({num_kv_heads}) "
                    "is supported; USE_CACHE_KV_INT8=0 serves the model without them"
                )
            return scale.reshape(-1)
    return None
