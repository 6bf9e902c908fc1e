"""Row operations of the specification: embedding, quantisation, RMS norm, SiLU.

Sums and transcendental functions run in float64, row by row, and are rounded once to float32: torch's own float32
forms can change a row's bits with the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.interface import FP8_RANGE, LIMB_RANGE, Activation, ActivationFormat, Quantized

LARGEST = torch.finfo(torch.float32).max


def quantize_rows(x: Tensor, absmax: Tensor, *, limbs: int) -> tuple[Tensor, Tensor]:
    """[M, K] float32 with |row| ≤ absmax [M] → integers [M, K] int32 and scales [M] float32.

    Where range / absmax is not finite (absmax below 1e-36) the largest float stands for it.
    """
    bound = LIMB_RANGE[limbs]
    q = torch.round(x * _inverse(absmax, bound)[:, None]).clamp(-bound, bound)
    return q.int(), absmax / bound


def _inverse(absmax: Tensor, bound: float) -> Tensor:
    # One division: torch computes `number / tensor` as number · (1 / tensor), which rounds twice.
    inverse = (torch.full_like(absmax, bound) / absmax).clamp(max=LARGEST)
    return torch.where(absmax > 0, inverse, torch.zeros_like(inverse))


def quantize_fp8(x: Tensor, absmax: Tensor, static_scale: float | None) -> tuple[Tensor, Tensor]:
    """[M, K] float32 → [M, K] e4m3 and scales [M] float32."""
    if static_scale is None:
        inverse, scale = _inverse(absmax, FP8_RANGE), absmax / FP8_RANGE
    else:
        scale = torch.full_like(absmax, static_scale)
        inverse = 1.0 / scale
    # beyond the largest number the type has no infinity: cut first
    return (x * inverse[:, None]).clamp(-FP8_RANGE, FP8_RANGE).to(torch.float8_e4m3fn), scale


def split_limbs(q: Tensor) -> tuple[Tensor, Tensor]:
    """Integers |q| ≤ 32512 as hi and lo in [-128, 127], q = 256 · hi + lo."""
    high = (q + 128) >> 8
    return high, q - 256 * high


class ReferenceRows:
    """The row operations of `interface.Kernels`. A `Quantized.q` here is [limbs, M, K] int8 or e4m3."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return table[token_ids].float()

    def absmax(self, x: Tensor) -> Tensor:
        return x.abs().amax(dim=1)

    def quantize(self, x: Tensor, format: ActivationFormat, *, absmax: Tensor | None = None) -> Activation:
        if format.limbs == 0:
            return x
        shape = (int(x.shape[0]), int(x.shape[1]))
        if format.fp8:
            q, scale = quantize_fp8(x, self.absmax(x) if absmax is None else absmax, format.static_scale)
            return Quantized(q[None], scale, shape, format)
        if format.static_scale is not None:
            scale = torch.full((shape[0],), format.static_scale, dtype=torch.float32)
            q = torch.round(x * (1.0 / scale[:, None])) + format.zero_point
            return Quantized(q.clamp(-128, 127).to(torch.int8)[None], scale, shape, format)
        q, scale = quantize_rows(x, self.absmax(x) if absmax is None else absmax, limbs=format.limbs)
        limbs = split_limbs(q) if format.limbs == 2 else (q,)
        return Quantized(torch.stack(limbs).to(torch.int8), scale, shape, format)

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, format: ActivationFormat, *, add: Tensor | None = None
    ) -> tuple[Activation, Tensor]:
        r = x if add is None else x + add
        y = torch.empty_like(r)
        for index, row in enumerate(r):
            mean = row.double().square().sum() / row.numel()
            inverse = (1.0 / torch.sqrt(mean + eps)).float()
            y[index] = (row * inverse) * weight.float()
        return self.quantize(y, format), r

    def silu_mul(self, gate_up: Tensor, format: ActivationFormat) -> Activation:
        gate, up = gate_up.chunk(2, dim=1)
        y = torch.empty_like(up, memory_format=torch.contiguous_format)
        for index, row in enumerate(gate):
            y[index] = (row.double() / (1.0 + torch.exp(-row.double()))).float() * up[index]
        return self.quantize(y, format)
