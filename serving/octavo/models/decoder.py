"""One decoder for all families: embedding, layers, norm, head. Run by the runner's worker thread.

Takes a `ForwardBatch` and the layers' caches; knows nothing of sequences or sampling. After the last layer's attention
only the rows whose logits are wanted go on: rows do not influence each other outside attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.interface import Kernels, LayerCache, PackedLinear
from octavo.models.batch import ForwardBatch
from octavo.models.config import ModelConfig
from octavo.models.layers import Attention, Experts, Mlp, Norm
from octavo.quantization.scheme import CacheScheme


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    attention_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp | Experts

    def forward(
        self, x: Tensor, batch: ForwardBatch, *, cos_sin: Tensor, cache: LayerCache, rows: Tensor | None = None
    ) -> Tensor:
        """[M, H] float32 → [M, H], or [R, H] with `rows` [R]. May change x."""
        normed, x = self.attention_norm(x, self.attention.qkv.format)
        heads = self.attention.attend(normed, cos_sin=cos_sin, layout=batch.layout, cache=cache)
        if rows is not None:
            heads, x = heads[rows], x[rows]
        x = self.attention.out(heads, residual=x)
        normed, x = self.mlp_norm(x, self.mlp.format)
        return self.mlp(normed, residual=x)


@dataclass(frozen=True)
class Decoder:
    """A loaded model."""

    config: ModelConfig
    kernels: Kernels
    embedding: Tensor  # [V, H], a float type
    layers: Sequence[DecoderLayer]
    norm: Norm
    head: PackedLinear
    cos_sin: Tensor  # [max_position, rotary_dim] float32
    cache_schemes: Sequence[CacheScheme]  # per layer
    weight_scheme: str

    def hidden(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Run a step: fills the caches and returns the residual stream of the wanted rows, [R, H] float32."""
        x = self.kernels.embedding(batch.token_ids, self.embedding)  # [M, H]
        last = len(self.layers) - 1
        for index, (layer, cache) in enumerate(zip(self.layers, caches)):
            rows = batch.logits_rows if index == last else None
            if rows is not None and rows.numel() == 0:
                return self._fill_last(layer, x, batch, cache)
            x = layer.forward(x, batch, cos_sin=self.cos_sin, cache=cache, rows=rows)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, H] → [R, V] float32, new memory. May change `hidden`."""
        normed, _ = self.norm(hidden, self.head.format)
        return self.kernels.linear(normed, self.head)

    def _fill_last(self, layer: DecoderLayer, x: Tensor, batch: ForwardBatch, cache: LayerCache) -> Tensor:
        """The last layer of a step that wants no logits: K and V into the cache, nothing else."""
        normed, x = layer.attention_norm(x, layer.attention.qkv.format)
        layer.attention.fill(normed, cos_sin=self.cos_sin, layout=batch.layout, cache=cache)
        return x[:0]
