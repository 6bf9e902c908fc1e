"""What all GPU kernels compute with: rounding, quantisation, limbs, exp. Functions of triton-lang, inlined in kernels.

Every kernel is launched with fused multiply-add switched off, and products that feed sums go through `rounded`, so each
operation rounds once, as the interface words it. Nothing here depends on the tile's shape: a row has the same bits in
any kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# `tl.constexpr` objects are what triton-lang lets a kernel read from its module.
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds |x| < 2^22 half to even
LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500801e-08)  # log2(e) beyond its float32
TF32_BITS = tl.constexpr(-8192)  # sign, exponent and the ten highest bits of the fraction


@triton.jit
def rounded(x, zero):
    """x. Keeps a product out of the sum behind it: `zero` is an integer 0 that the compiler cannot know.

    From sm_100 on the assembler joins packed products and sums into one rounding, whatever it is told.
    """
    return (x.to(tl.int32, bitcast=True) + zero).to(tl.float32, bitcast=True)


@triton.jit
def begin(PDL: tl.constexpr):
    """Every kernel of a step starts with this. PDL: the program was launched while the kernel before was still running;
    it waits for the end of that one, then lets the next be launched. All that comes behind may read and write memory.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def rint(x):
    """Round |x| < 2^22 to the nearest integer, half to even; float32 in and out."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def inverse_scale(absmax, RANGE: tl.constexpr):
    """RANGE / absmax, the largest float where that overflows, 0 for a row of zeros."""
    bound = tl.full(absmax.shape, RANGE, tl.float32)
    safe = tl.where(absmax > 0.0, absmax, 1.0)
    return tl.where(absmax > 0.0, tl.minimum(tl.div_rn(bound, safe), LARGEST), 0.0)


@triton.jit
def row_scale(absmax, RANGE: tl.constexpr):
    """absmax / RANGE, rounded once."""
    return tl.div_rn(absmax, tl.full(absmax.shape, RANGE, tl.float32))


@triton.jit
def to_integers(x, inverse, RANGE: tl.constexpr):
    """clamp(rint(x · inverse)) as int32. Clamping first gives the same integers and keeps the rounding in range."""
    return rint(tl.minimum(tl.maximum(x * inverse, -RANGE), RANGE)).to(tl.int32)


@triton.jit
def integer_bits(x):
    """Bits whose low 16 hold rint(x) in two's complement, |x| ≤ 32767: the sum's fraction, no conversion needed."""
    return (x + ROUNDER).to(tl.int32, bitcast=True)


@triton.jit
def high_limb(q):
    """hi of q = 256 · hi + lo as int8, of an integer |q| ≤ 32512 or of its `integer_bits`."""
    return ((q + 128) >> 8).to(tl.int8)


@triton.jit
def low_limb(q):
    """lo of q = 256 · hi + lo as int8: the low byte, of an integer or of its `integer_bits`."""
    return q.to(tl.int8)


@triton.jit
def exp_accurate(x):
    """exp of float32 within 2 units in the last place, results below 2^-126 as 0.

    exp2(n) · exp2(f) with n whole and f in [-1/2, 1/2]: the plain form loses |x| · 2^-24 in x · log2(e).
    """
    x = tl.minimum(tl.maximum(x, -104.0), 89.0)
    t = x * LOG2E
    n = rint(t)
    f = tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -n)
    f = tl.fma(x, tl.full(x.shape, LOG2E_REST, tl.float32), f)
    half = rint(n * 0.5)
    return (tl.exp2(f) * _power(half)) * _power(n - half)


@triton.jit
def _power(n):
    """2^n for whole n in [-126, 127], from its bits."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def top_bits(x):
    """x cut to the bits that a tf32 product keeps; x minus this is exact."""
    return (x.to(tl.int32, bitcast=True) & TF32_BITS).to(tl.float32, bitcast=True)


@triton.jit
def dot_float(x, w, acc, EXACT_TF32: tl.constexpr):
    """acc + x · w in float32. EXACT_TF32: w came from 16 bits, so tf32 holds it, and x goes in three parts."""
    if EXACT_TF32:
        first = top_bits(x)
        second = top_bits(x - first)
        third = (x - first) - second
        acc = tl.dot(third, w, acc, input_precision="tf32")
        acc = tl.dot(second, w, acc, input_precision="tf32")
        return tl.dot(first, w, acc, input_precision="tf32")
    else:
        return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def product_tile(
    hi_ptrs,  # [BLOCK_M, BLOCK_K] pointers to the first step's activations, upper limb
    lo_ptrs,
    w_ptrs,  # [BLOCK_N, BLOCK_K]
    w_row,  # [BLOCK_N] int64
    w_scale_ptr,
    correction_ptr,
    zero_ptr,
    N,
    K,
    zero,  # 0, as `rounded` takes it
    STEPS_PER_GROUP: tl.constexpr,
    LIMBS: tl.constexpr,
    HAS_INPUT_ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ t · sw over the groups, [BLOCK_M, BLOCK_N] float32: all of a product but the scales of the rows.

    LIMBS 0: operands of e4m3, one group, no zero points.
    """
    if LIMBS == 0:
        return _product_fp8(hi_ptrs, w_ptrs, w_row, w_scale_ptr, K, BLOCK_M, BLOCK_N, BLOCK_K)
    hi = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    lo = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    hi_sum = tl.zeros((BLOCK_M,), tl.int32)
    lo_sum = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        w = tl.load(w_ptrs).T
        x_hi = tl.load(hi_ptrs)
        hi = tl.dot(x_hi, w, hi, out_dtype=tl.int32)
        if LIMBS == 2:
            x_lo = tl.load(lo_ptrs)
            lo = tl.dot(x_lo, w, lo, out_dtype=tl.int32)
            lo_ptrs += BLOCK_K
        if HAS_ZERO:
            hi_sum += tl.sum(x_hi.to(tl.int32), 1)
            if LIMBS == 2:
                lo_sum += tl.sum(x_lo.to(tl.int32), 1)
        hi_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
        if STEPS_PER_GROUP > 0 and (step + 1) % STEPS_PER_GROUP == 0:
            at = (step // STEPS_PER_GROUP) * N + w_row
            scaled = scaled_sums(
                hi, lo, hi_sum, lo_sum, at, w_scale_ptr, correction_ptr, zero_ptr, LIMBS, HAS_INPUT_ZERO, HAS_ZERO
            )
            total += rounded(scaled, zero)
            hi = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            lo = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
            hi_sum = tl.zeros((BLOCK_M,), tl.int32)
            lo_sum = tl.zeros((BLOCK_M,), tl.int32)
    if STEPS_PER_GROUP == 0:
        total = scaled_sums(
            hi, lo, hi_sum, lo_sum, w_row, w_scale_ptr, correction_ptr, zero_ptr, LIMBS, HAS_INPUT_ZERO, HAS_ZERO
        )
    return total


@triton.jit
def part_sums(
    hi_ptrs,
    lo_ptrs,
    w_ptrs,
    K,  # inputs of this part
    LIMBS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sums of the upper and lower limbs over some inputs, [BLOCK_M, BLOCK_N] int32 each: exact, so parts may be added
    in any order.
    """
    hi = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    lo = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, tl.cdiv(K, BLOCK_K)):
        w = tl.load(w_ptrs).T
        hi = tl.dot(tl.load(hi_ptrs), w, hi, out_dtype=tl.int32)
        if LIMBS == 2:
            lo = tl.dot(tl.load(lo_ptrs), w, lo, out_dtype=tl.int32)
            lo_ptrs += BLOCK_K
        hi_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return hi, lo


@triton.jit
def _product_fp8(
    x_ptrs, w_ptrs, w_row, w_scale_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """t · sw of e4m3. Tensor cores of sm_90 keep few bits while they add: each BLOCK_K goes to a float32 sum."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, tl.cdiv(K, BLOCK_K)):
        total = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs).T, total, max_num_imprecise_acc=BLOCK_K)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    return total * tl.load(w_scale_ptr + w_row)[None, :]


@triton.jit
def scaled_sums(
    hi,  # [BLOCK_M, BLOCK_N] int32
    lo,
    hi_sum,  # [BLOCK_M] int32: sums of the activations of this group
    lo_sum,
    at,  # [BLOCK_N] where this group's scales lie
    w_scale_ptr,
    correction_ptr,
    zero_ptr,
    LIMBS: tl.constexpr,
    HAS_INPUT_ZERO: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):
    """t · sw of one group; int32 may wrap on the way, the corrected sum fits."""
    if HAS_ZERO:
        zero = tl.load(zero_ptr + at)[None, :]
        hi -= zero * hi_sum[:, None]
        if LIMBS == 2:
            lo -= zero * lo_sum[:, None]
    if HAS_INPUT_ZERO:
        hi -= tl.load(correction_ptr + at)[None, :]
    t = hi.to(tl.float32)
    if LIMBS == 2:
        t = t * 256.0 + lo.to(tl.float32)
    return t * tl.load(w_scale_ptr + at)[None, :]
