"""Row operations on the CPU. Those that end in a quantisation write the bytes that the products read (see
products.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.kernels.cpu.library import CpuBase, checked, empty_floats, pointer
from octavo.kernels.cpu.products import FLOAT_TYPES
from octavo.kernels.interface import Activation, ActivationFormat, Quantized

Address = int | None
_QUICK = 1 << 17  # floats that are written while another thread would get the interpreter lock
SIGNATURES = {
    "octavo_embedding": "pppiiip",
    "octavo_absmax": "ppiip",
    "octavo_quantize": "ppiipifipp",
    "octavo_rms_norm": "ppppdiiifippp",
    "octavo_silu_mul": "ppiiifippp",
}


def empty_activation(rows: int, width: int, format: ActivationFormat) -> Activation:
    """Memory for `rows` in `format`: float32 [rows, width], or bytes [rows · limbs, width padded to 64] and scales."""
    if format.limbs == 0:
        return torch.empty(rows, width, dtype=torch.float32)
    q = torch.empty(rows * format.limbs, (width + 63) // 64 * 64, dtype=torch.uint8)
    return Quantized(q, torch.empty(rows, dtype=torch.float32), (rows, width), format)


def output_arguments(out: Activation, format: ActivationFormat) -> tuple[int, float, int, Address, Address, Address]:
    """limbs, static scale (0: none), zero point, and where floats, bytes and scales go, as native functions take
    them.
    """
    if isinstance(out, Quantized):
        static = format.static_scale or 0.0
        return format.limbs, static, format.zero_point, None, out.q.data_ptr(), out.scale.data_ptr()
    return 0, 0.0, 0, out.data_ptr(), None, None


class CpuRows(CpuBase):
    """The row operations of `interface.Kernels`."""

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        ids = checked(token_ids, torch.int64, (-1,), "token_ids")
        if table.dtype not in FLOAT_TYPES or table.dim() != 2 or not table.is_contiguous():
            raise ValueError(f"an embedding must be contiguous float [V, H], not {table.dtype} {list(table.shape)}")
        rows, width = ids.shape[0], table.shape[1]
        values = ids.numpy()
        if rows and (values.min() < 0 or values.max() >= table.shape[0]):
            raise IndexError(f"token ids must be from 0 to {table.shape[0] - 1}")
        y = empty_floats(rows, width)
        library = self._quick if rows * width <= _QUICK else self._lib
        library.octavo_embedding(
            self._pool, pointer(ids), pointer(table), FLOAT_TYPES[table.dtype], rows, width, pointer(y)
        )
        return y

    def absmax(self, x: Tensor) -> Tensor:
        x = checked(x, torch.float32, (-1, -1), "x")
        y = torch.empty(x.shape[0], dtype=torch.float32)
        self._lib.octavo_absmax(self._pool, pointer(x), x.shape[0], x.shape[1], pointer(y))
        return y

    def quantize(self, x: Tensor, format: ActivationFormat, *, absmax: Tensor | None = None) -> Activation:
        if format.limbs == 0:
            return x
        x = checked(x, torch.float32, (-1, -1), "x")
        rows, width = x.shape
        if absmax is not None:
            absmax = checked(absmax, torch.float32, (rows,), "absmax")
        out = empty_activation(rows, width, format)
        limbs, static, zero_point, _, q, scale = output_arguments(out, format)
        self._lib.octavo_quantize(
            self._pool, pointer(x), rows, width, pointer(absmax), limbs, static, zero_point, q, scale
        )
        return out

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, format: ActivationFormat, *, add: Tensor | None = None
    ) -> tuple[Activation, Tensor]:
        x = checked(x, torch.float32, (-1, -1), "x")
        rows, width = x.shape
        weight = checked(weight.float(), torch.float32, (width,), "weight")
        if add is not None:
            add = checked(add, torch.float32, (rows, width), "add")
        out = empty_activation(rows, width, format)
        self._lib.octavo_rms_norm(
            self._pool, pointer(x), pointer(add), pointer(weight), eps, rows, width, *output_arguments(out, format)
        )
        return out, x

    def silu_mul(self, gate_up: Tensor, format: ActivationFormat) -> Activation:
        gate_up = checked(gate_up, torch.float32, (-1, -1), "gate_up")
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = empty_activation(rows, width, format)
        self._lib.octavo_silu_mul(self._pool, pointer(gate_up), rows, width, *output_arguments(out, format))
        return out
