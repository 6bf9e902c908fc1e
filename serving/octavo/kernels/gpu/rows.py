"""Row operations of the GPU backend: memory for results and launches of row_kernels.py.

A `Quantized.q` of this backend is int8 or e4m3 [limbs, M, stride], stride the width rounded up to 128, zeros behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.gpu import row_kernels
from octavo.kernels.gpu.device import GpuBase, checked, power_of_two, round_up, row_warps
from octavo.kernels.interface import FLOAT, Activation, ActivationFormat, Quantized

STRIDE = 128  # rows of integers are multiples of this
WIDEST = 16384  # largest row of silu_mul that is quantised where it is made
COLUMNS = 1024  # columns of one program where rows are cut
FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def empty_activation(rows: int, width: int, format: ActivationFormat, device: torch.device) -> Activation:
    """Memory for `rows` in `format`."""
    if format.limbs == 0:
        return torch.empty(rows, width, dtype=torch.float32, device=device)
    dtype = torch.float8_e4m3fn if format.fp8 else torch.int8
    q = torch.empty(format.limbs, rows, round_up(width, STRIDE), dtype=dtype, device=device)
    return Quantized(q, torch.empty(rows, dtype=torch.float32, device=device), (rows, width), format)


def static_arguments(format: ActivationFormat) -> tuple[float, float]:
    """1 / scale and scale in float32; zeros for a dynamic format."""
    if format.static_scale is None:
        return 0.0, 0.0
    scale = torch.tensor(format.static_scale, dtype=torch.float32)
    return float(torch.reciprocal(scale)), float(scale)


class GpuRows(GpuBase):
    """The row operations of `interface.Kernels`."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """See the interface. Ids are not checked, that would wait for the device: one outside takes the nearest row."""
        ids = checked(token_ids, torch.int64, (-1,), "token_ids")
        if table.dtype not in FLOAT_TYPES or table.dim() != 2 or not table.is_contiguous():
            raise ValueError(f"an embedding must be contiguous float [V, H], not {table.dtype} {list(table.shape)}")
        rows, width = ids.shape[0], table.shape[1]
        y = torch.empty(rows, width, dtype=torch.float32, device=self.device)
        if rows:
            grid = (rows, -(-width // COLUMNS))
            row_kernels.embedding[grid](ids, table, y, table.shape[0], width, BLOCK=COLUMNS, num_warps=4)
        return y

    def absmax(self, x: Tensor) -> Tensor:
        x = checked(x, torch.float32, (-1, -1), "x")
        return x.abs().amax(dim=1)  # a maximum has no order

    def quantize(self, x: Tensor, format: ActivationFormat, *, absmax: Tensor | None = None) -> Activation:
        if format.limbs == 0:
            return x
        x = checked(x, torch.float32, (-1, -1), "x")
        rows, width = x.shape
        if absmax is not None:
            absmax = checked(absmax, torch.float32, (rows,), "absmax")
        out = empty_activation(rows, width, format, self.device)
        assert isinstance(out, Quantized)
        if rows:
            block = power_of_two(out.q.shape[2])
            row_kernels.quantize_rows[(rows,)](
                x, x if absmax is None else absmax, out.q, out.scale, rows, width, out.q.shape[2],
                *static_arguments(format), HAS_ABSMAX=absmax is not None, LIMBS=format.limbs,
                STATIC=format.static_scale is not None, ZERO_POINT=format.zero_point, BLOCK=block,
                num_warps=row_warps(block), enable_fp_fusion=False, **self._launch,
            )  # fmt: skip
        return out

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, format: ActivationFormat, *, add: Tensor | None = None
    ) -> tuple[Activation, Tensor]:
        x = checked(x, torch.float32, (-1, -1), "x")
        rows, width = x.shape
        weight = checked(weight.float(), torch.float32, (width,), "weight")
        if add is not None:
            add = checked(add, torch.float32, (rows, width), "add")
        out = empty_activation(rows, width, format, self.device)
        values, scale, stride = _parts(out, width)
        if rows:
            block = power_of_two(stride)
            row_kernels.rms_norm[(rows,)](
                x, x if add is None else add, weight, values, scale, rows, width, stride, *static_arguments(format),
                EPS=eps, HAS_ADD=add is not None, LIMBS=format.limbs, STATIC=format.static_scale is not None,
                ZERO_POINT=format.zero_point, BLOCK=block, num_warps=row_warps(block), enable_fp_fusion=False,
                **self._launch,
            )  # fmt: skip
        return out, x

    def silu_mul(self, gate_up: Tensor, format: ActivationFormat) -> Activation:
        gate_up = checked(gate_up, torch.float32, (-1, -1), "gate_up")
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        if format.limbs and width > WIDEST:  # more than a program's registers hold
            return self.quantize(self.silu_mul(gate_up, FLOAT), format)
        out = empty_activation(rows, width, format, self.device)
        values, scale, stride = _parts(out, width)
        if rows:
            block = power_of_two(stride) if format.limbs else COLUMNS
            row_kernels.silu_mul[(rows, 1 if format.limbs else -(-width // COLUMNS))](
                gate_up, values, scale, rows, width, stride, *static_arguments(format), LIMBS=format.limbs,
                STATIC=format.static_scale is not None, ZERO_POINT=format.zero_point, BLOCK=block,
                num_warps=row_warps(block), enable_fp_fusion=False, **self._launch,
            )  # fmt: skip
        return out


def _parts(out: Activation, width: int) -> tuple[Tensor, Tensor, int]:
    """Where values and scales go, and the length of a row; floats have no scales, their own memory stands in."""
    if isinstance(out, Quantized):
        return out.q, out.scale, out.q.shape[2]
    return out, out, width
