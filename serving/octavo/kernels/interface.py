"""The operations a model is made of: shapes, arithmetic, and what belongs to the backend.

A backend is one object with these methods; `reference/` (torch, slow, obviously right) is the specification, `cpu/`
and `gpu/` are
fast. Every operation is row-independent: a row's bits depend on that row and the weights alone, never on how many
rows there
are, on their order, or on the number of threads. Integer sums are exact, so fast backends equal the reference bit for
bit up to
the last float epilogue (stated per operation); where float order or `exp` differ, tests state the bound.

Activations between operations are float32 (CPU) rows [M, width]. M counts the tokens of a step.

Two limbs. `limbs=1`: q = rint(x · (127 / a)), scale a / 127. `limbs=2`: q = rint(x · (32512 / a)), scale a / 32512,
held as hi = (q + 128) >> 8 and
lo = q − 256·hi, both in [-128, 127]. a is the row's absolute maximum in float32; a = 0 gives q = 0 and scale 0. rint
rounds half to even. Divisions and
products are single float32 operations, in the order written.

e4m3. `fp8=True` (limbs 1): q = e4m3(x · (448 / a)), scale a / 448, or q = e4m3(x · (1 / scale)) with a static scale;
cut to ±448 and rounded to the nearest 8-bit float, half to even.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

LIMB_RANGE = {1: 127.0, 2: 32512.0}
FP8_RANGE = 448.0  # the largest e4m3
FP8_STEP = 128  # inputs whose products in e4m3 are one float32 sum
TILE = 128  # tokens of one attention tile, at absolute positions
SEGMENT = 256  # tokens of one attention segment: two tiles
BLOCK = 64  # tokens of one cache block


@dataclass(frozen=True)
class ActivationFormat:
    """What an operation hands to the product behind it.

    limbs 0: float32. 1 or 2: integers with a dynamic scale per row, or with a static scale
    (q = clamp(rint(x · (1 / scale)) + zero_point, -128, 127), limbs 1 only). fp8, with limbs 1 and zero point 0: e4m3
    in place of integers.
    """

    limbs: int = 0
    static_scale: float | None = None
    zero_point: int = 0
    fp8: bool = False


FLOAT = ActivationFormat(0)


@dataclass(frozen=True)
class Quantized:
    """Rows as integers, x ≈ (q − zero_point) · scale. How `q` is stored belongs to the backend."""

    q: Any
    scale: Tensor  # [M] float32
    shape: tuple[int, int]  # (M, K)
    format: ActivationFormat


Activation = Tensor | Quantized


class PackedLinear(Protocol):
    """Weights of one product y = x · Wᵀ + b in the backend's own layout."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def format(self) -> ActivationFormat:
        """What it multiplies with; limbs 0 for float weights."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class BatchLayout:
    """Where the rows of a step belong. Rows of one sequence are neighbours, positions ascending. All int32, on the
    device.
    """

    query_start: Tensor  # [B + 1] first row of each sequence
    seq_lens: Tensor  # [B] tokens in the cache once this step's are written
    block_tables: Tensor  # [B, max_blocks] block ids, unused entries 0
    positions: Tensor  # [M] absolute position of each row
    slot_mapping: Tensor  # [M] block id · 64 + offset in the block
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class HeadLayout:
    """Heads of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float  # softmax scale, usually head_dim ** -0.5
    window: int | None = None  # a token sees itself and the window - 1 before it


@dataclass(frozen=True)
class CacheSpec:
    """The K/V cache of one layer. dtype int8: dynamic scales per token and head, or static ones if given."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # int8, or a float type
    k_scale: Tensor | None = None  # [1] or [num_kv_heads] float32, static
    v_scale: Tensor | None = None


class LayerCache(Protocol):
    """Blocks of one layer; layout belongs to the backend, zeroed when made."""

    spec: CacheSpec
    num_blocks: int
    nbytes: int


@dataclass(frozen=True)
class SamplingRows:
    """How each of B rows of logits is sampled. Lists per row are in CSR form (start[i] .. start[i+1])."""

    temperature: Tensor  # [B] float32; 0: argmax
    top_p: Tensor  # [B] float32
    top_k: Tensor  # [B] int32; 0: all
    min_p: Tensor  # [B] float32
    seed: Tensor  # [B] int64, bits of the unsigned seed
    position: Tensor  # [B] int64, number of output tokens so far
    repetition_penalty: Tensor  # [B] float32
    frequency_penalty: Tensor  # [B] float32
    presence_penalty: Tensor  # [B] float32
    seen_start: Tensor  # [B + 1] int32
    seen_ids: Tensor  # [S] int32: tokens of prompt or output, each once per row; below 0: none, passed over
    seen_counts: Tensor  # [S] int32: times in the output; 0: in the prompt only
    bias_start: Tensor  # [B + 1] int32
    bias_ids: Tensor  # [T] int32
    bias_values: Tensor  # [T] float32; -inf bans


class Kernels(Protocol):
    """One backend. Methods may reuse buffers: a result is good until the same operation runs again, unless stated."""

    name: str
    device: torch.device

    # ---- weights

    def pack_int8(
        self,
        weight: Tensor,  # [N, K] int8
        scale: Tensor,  # [N, 1] or [N, K / group] or [1] float32
        *,
        format: ActivationFormat,
        zero_point: Tensor | None = None,  # like scale, int8/int32; w = (q - zero_point) · scale
        bias: Tensor | None = None,  # [N] float32
    ) -> PackedLinear:
        """Pack once at load. The product is

        acc_l[m, n, g] = Σ_k (xq_l[m, k] - zx) · (wq[n, k] - zw[n, g])      exact, per limb l and group g
        t[m, n, g]     = f32(acc_1)                                          limbs 1
                       = f32(acc_hi) · 256 + f32(acc_lo)                     limbs 2
        u[m, n]        = t[m, n] · sw[n]                                     one group
                       = ((0 + t[m, n, 0] · sw[n, 0]) + t[m, n, 1] · sw[n, 1]) + …   ascending g
        y[m, n]        = u · sx[m] (+ b[n]) (+ residual[m, n])               each a float32 operation, no fused
        multiply-add
        """
        ...

    def pack_float(self, weight: Tensor, *, bias: Tensor | None = None) -> PackedLinear:
        """[N, K] float32, bfloat16 or float16, kept in its type; products accumulate in float32 in a K order that
        does not depend on M.
        """
        ...

    def linear(self, x: Activation, weight: PackedLinear, *, residual: Tensor | None = None) -> Tensor:
        """[M, N] float32. `x` must have the weight's format. The result is new memory."""
        ...

    # ---- rows

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """[M] int64 ids, [V, H] any float type → [M, H] float32, new memory."""
        ...

    def absmax(self, x: Tensor) -> Tensor:
        """[M, K] → [M] float32 (tensor parallel: the maximum over ranks goes to `quantize`)."""
        ...

    def quantize(self, x: Tensor, format: ActivationFormat, *, absmax: Tensor | None = None) -> Activation:
        """[M, K] float32 → rows in `format`; limbs 0 returns x."""
        ...

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, format: ActivationFormat, *, add: Tensor | None = None
    ) -> tuple[Activation, Tensor]:
        """r = x (+ add); y = (r · rsqrt(mean(r²) + eps)) · weight, in `format`. Returns (y, r); r may be x, changed
        in place.
        """
        ...

    def silu_mul(self, gate_up: Tensor, format: ActivationFormat) -> Activation:
        """[M, 2·I] → silu(gate) · up in `format`, [M, I]; gate is the first half."""
        ...

    # ---- attention

    def make_cache(self, spec: CacheSpec, num_blocks: int) -> LayerCache:
        """Zeroed blocks for one layer."""
        ...

    def cache_block_bytes(self, spec: CacheSpec) -> int:
        """Bytes of one block of one layer, K and V and scales."""
        ...

    def rope_write(
        self,
        qkv: Tensor,  # [M, (num_heads + 2 · num_kv_heads) · head_dim] float32: q heads, k heads, v heads
        cos_sin: Tensor,  # [max_position, rotary_dim] float32: cos (first half), sin (second half)
        layout: BatchLayout,
        heads: HeadLayout,
        cache: LayerCache,
        *,
        q_norm: Tensor | None = None,  # [head_dim] RMS norm of each head before rope (Qwen3), with eps
        k_norm: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """Rotate q and k (halves i and i + rotary_dim/2 form a pair; the rest of head_dim passes), write k and v into
        the cache, return q [M, num_heads · head_dim].

        int8 dynamic: a row's K (and V) of one head is quantised like `limbs=1`; static: q = clamp(rint(x · (1 /
        scale)), -128, 127).
        """
        ...

    def attention(self, q: Tensor, layout: BatchLayout, heads: HeadLayout, cache: LayerCache) -> Tensor:
        """Causal attention of every row over the cache, [M, num_heads · head_dim] float32. A row at position p sees
        tokens ≤ p (in its window).

        Arithmetic for an int8 cache, per row and head (kv head = head // (num_heads / num_kv_heads)); the same for a
        prompt's chunk and for decode:
            q15, qs = the row's head quantised with limbs=2
            for each tile of 128 tokens at absolute positions with a visible token, over its visible tokens t:
                s[t] = f32(Σ_d q15[d] · K[t, d]) · ((qs · heads.scale) · ks[t])
                m = max s;  e[t] = exp(s[t] − m);  l = Σ e[t]
                w[t] = e[t] · vs[t];  a = max w;  p15[t] = rint(w[t] · (32512 / a))
                o[d] = f32(Σ_t p15[t] · V[t, d]) · (a / 32512)
            two tiles make a segment, segments fold left in ascending order, both by
                combine((m1,l1,o1),(m2,l2,o2)): m = max(m1,m2), f1 = exp(m1 − m), f2 = exp(m2 − m), (m, l1·f1 + l2·f2,
                o1·f1 + o2·f2)
            out[d] = o[d] / l
        A float cache has the same tiles and segments with float32 dots and no quantisation of q or p.
        """
        ...

    # ---- mixture of experts

    def moe_route(self, router_logits: Tensor, top_k: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
        """[M, E] float32 → expert ids [M, top_k] int64 and weights [M, top_k] float32: softmax over all experts, the
        top_k (ties: the lower id first), their weights divided by their sum if renormalize.
        """
        ...

    def moe_combine(self, expert_out: Tensor, weights: Tensor) -> Tensor:
        """[M, top_k, H], [M, top_k] → [M, H]: ((w0·y0) + w1·y1) + …, in top-k order, no fused multiply-add."""
        ...

    # ---- sampling

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        """[B, V] float32 → token ids [B] int64. `logits` may be changed in place.

        Per row: seen tokens: z > 0 ? z / repetition : z · repetition; then z −= frequency · count, z −= presence if
        count > 0; then biases added; temperature 0: argmax
        (ties: lowest id). Else z /= temperature; top_k largest (ties: lower ids first); p = softmax; top_p: the
        shortest prefix in descending (p, ascending id) order whose
        sum reaches top_p, at least one; min_p: p ≥ min_p · max p. Then the inverse CDF of what is left in ascending
        id order at u · Σ, summed in float64, with
        u = uniform(seed, position): (splitmix64(seed + splitmix64(position)) >> 11) · 2⁻⁵³.
        """
        ...

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-softmax of rows [R, V] → (logprob [R], rank [R] from 1, top ids [R, num_top], top logprobs [R,
        num_top]), ties by lower id. Does not change logits.
        """
        ...


# ---- products of 8-bit floats, where a backend can


@runtime_checkable
class LimitsShapes(Protocol):
    """A backend that does not serve every shape of attention: asked once, before weights are read."""

    def refuses(self, spec: CacheSpec, *, num_heads: int) -> str:
        """Why layers with such a cache cannot run, in one sentence; empty if they can."""
        ...


@runtime_checkable
class MultipliesFp8(Protocol):
    """A backend that may multiply e4m3 as it is."""

    @property
    def multiplies_fp8(self) -> bool:
        """Whether this device can. Else such weights have to come as integers."""
        ...

    def pack_fp8(
        self,
        weight: Tensor,  # [N, K] float8_e4m3fn
        scale: Tensor,  # [N, 1] or [1] float32
        *,
        format: ActivationFormat,  # fp8
        bias: Tensor | None = None,  # [N] float32
    ) -> PackedLinear:
        """Pack once at load. The product is

        s[m, n, i] = f32(Σ_k xq[m, k] · wq[n, k])   over the i-th FP8_STEP inputs, in an order that is the backend's own
        t[m, n]    = ((0 + s[m, n, 0]) + s[m, n, 1]) + …   in float32
        y[m, n]    = (t · sw[n]) · sx[m] (+ b[n]) (+ residual[m, n])

        The order does not depend on M. Tensor cores may keep fewer bits of a step's sum than float32 has.
        """
        ...


def multiplies_fp8(kernels: object) -> bool:
    """Whether e4m3 weights need no conversion for this backend."""
    return isinstance(kernels, MultipliesFp8) and kernels.multiplies_fp8


# ---- whole layers, where a backend can run them in one call


@dataclass(frozen=True)
class DenseLayer:
    """A decoder layer without experts as its operations: rms_norm, linear (qkv), rope_write, attention, quantize,
    linear (out, + x), rms_norm, linear (gate_up), silu_mul, linear (down, + x), in this order on one residual stream.
    """

    attention_norm: Tensor  # [H] float32
    qkv: PackedLinear
    q_norm: Tensor | None  # [head_dim] float32
    k_norm: Tensor | None
    heads: HeadLayout
    out: PackedLinear
    mlp_norm: Tensor  # [H] float32
    gate_up: PackedLinear
    down: PackedLinear
    eps: float


@dataclass(frozen=True)
class Head:
    """What follows the layers: the last norm, and the product with the vocabulary."""

    norm: Tensor  # [H] float32
    eps: float
    product: PackedLinear  # H → V


class LayerStack(Protocol):
    """All layers of a model and its head."""

    def run(
        self,
        x: Tensor,
        layout: BatchLayout,
        caches: Sequence[LayerCache],
        rows: Tensor,  # [R] int64
    ) -> Tensor:
        """[M, H] float32, changed, → the residual stream of `rows` after the last layer, [R, H] float32, new memory.
        The bits are those of the operations one by one. Without rows the last layer only writes its cache.
        """
        ...

    def sample(
        self,
        x: Tensor,
        layout: BatchLayout,
        caches: Sequence[LayerCache],
        rows: Tensor,  # [R] int64, R > 0
        sampling: SamplingRows,  # of R rows
    ) -> Tensor:
        """`run`, the last norm, the head and `Kernels.sample` at once: [M, H] float32, changed, → [R] int64, new."""
        ...


@runtime_checkable
class StacksLayers(Protocol):
    """A backend that may run whole layers."""

    def stack_layers(self, layers: Sequence[DenseLayer], cos_sin: Tensor, head: Head) -> LayerStack | None:
        """None: these have to run one operation at a time."""
        ...


# ---- all experts of a layer, where a backend can run them in one call


class ExpertWeights(Protocol):
    """One product of all experts, in the backend's own layout."""

    @property
    def out_features(self) -> int: ...

    @property
    def format(self) -> ActivationFormat: ...

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class GroupsExperts(Protocol):
    """A backend that may run the MLPs of all experts at once, without asking the host which rows go where."""

    def stack_experts(self, products: Sequence[PackedLinear]) -> ExpertWeights | None:
        """One product of each expert, copied together. None: these have to run one by one."""
        ...

    def run_experts(self, x: Activation, ids: Tensor, gate_up: ExpertWeights, down: ExpertWeights) -> Tensor:
        """[M, H] in gate_up's format and expert ids [M, top_k] → [M, top_k, H] float32: down(silu(gate) · up).

        The bits are those of the experts one by one.
        """
        ...
