"""Products on the CPU: packs int8 weights into panels, keeps float weights as they are, and calls the native products.

A `Quantized.q` of this backend is bytes [M · limbs, K padded to 64] with u = q + 128; a two-limb row is two
neighbours, hi and lo.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.cpu.library import CpuBase, checked, empty_result, pointer
from octavo.kernels.interface import FLOAT, Activation, ActivationFormat, PackedLinear, Quantized
from octavo.kernels.reference.products import check_int8, per_group

SIGNATURES = {
    "octavo_pack_int8": "ppiiipp",
    "octavo_linear_int8": "ppppiipp",
    "octavo_linear_float": "pppiiiippp",
}
FLOAT_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Int8Weights(ctypes.Structure):
    """Mirror of the struct in csrc/gemm.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("correction", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("limbs", ctypes.c_int64),
    )


@dataclass(frozen=True)
class CpuInt8Linear:
    """Packed int8 weights. `parts` are the tensors that `native` points into."""

    in_features: int
    out_features: int
    format: ActivationFormat
    parts: tuple[Tensor, ...]
    native: Int8Weights

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)


@dataclass(frozen=True)
class CpuFloatLinear:
    """Float weights [N, K] where they lie: a table shared with the embedding stays shared."""

    weight: Tensor
    bias: Tensor | None
    format: ActivationFormat = FLOAT

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def nbytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.numel() * self.bias.element_size()
        return self.weight.numel() * self.weight.element_size() + bias


class CpuProducts(CpuBase):
    """`pack_int8`, `pack_float` and `linear` of `interface.Kernels`."""

    def pack_int8(
        self,
        weight: Tensor,
        scale: Tensor,
        *,
        format: ActivationFormat,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> CpuInt8Linear:
        outputs, inputs = weight.shape
        scale = per_group(scale.float(), weight=weight, name="scale")  # [N, G]
        groups = scale.shape[1]
        if zero_point is not None:
            zero_point = per_group(zero_point.int(), weight=weight, name="zero_point").expand_as(scale)
        check_int8(weight, zero_point, format=format, group_size=inputs // groups)
        bias = None if bias is None else checked(bias.float(), torch.float32, (outputs,), "bias")

        panels = -(-outputs // 32) * 2
        packed = self._memory.empty((panels, -(-inputs // 4), 64), torch.int8)
        correction = self._memory.empty((groups, panels * 16), torch.int32)
        source = weight.contiguous()
        self._lib.octavo_pack_int8(
            self._pool, pointer(source), outputs, inputs, groups, pointer(packed), pointer(correction)
        )
        correction *= 128 + format.zero_point
        parts = [packed, correction, self._columns(scale.T, panels * 16)]
        parts += [] if zero_point is None else [self._columns(zero_point.T, panels * 16)]
        parts += [] if bias is None else [self._columns(bias[None], panels * 16)]
        return _describe(
            parts,
            has_zero_point=zero_point is not None,
            has_bias=bias is not None,
            shape=(outputs, inputs),
            format=format,
        )

    def _columns(self, values: Tensor, width: int) -> Tensor:
        """[G, N] as [G, width], padded with zeros, where weights live."""
        padded = self._memory.empty((values.shape[0], width), values.dtype)
        padded.zero_()
        padded[:, : values.shape[1]] = values
        return padded

    def pack_float(self, weight: Tensor, *, bias: Tensor | None = None) -> CpuFloatLinear:
        if weight.dtype not in FLOAT_TYPES or weight.dim() != 2:
            raise ValueError(f"a float weight must be float32, float16 or bfloat16 [N, K], not {weight.dtype}")
        bias = None if bias is None else checked(bias.float(), torch.float32, (weight.shape[0],), "bias")
        return CpuFloatLinear(weight.contiguous(), bias)

    def linear(self, x: Activation, weight: PackedLinear, *, residual: Tensor | None = None) -> Tensor:
        rows = x.shape[0]
        y = empty_result(self._lib, rows, weight.out_features)
        if residual is not None:
            residual = checked(residual, torch.float32, (rows, weight.out_features), "residual")
        if isinstance(x, Quantized):
            self._integer_product(x, weight, residual, y)
        else:
            self._float_product(x, weight, residual, y)
        return y

    def _integer_product(self, x: Quantized, weight: PackedLinear, residual: Tensor | None, y: Tensor) -> None:
        if not isinstance(weight, CpuInt8Linear) or x.format != weight.format or x.shape[1] != weight.in_features:
            wanted = f"{weight.format} of {weight.in_features} inputs"
            raise ValueError(f"the weight multiplies {wanted}, not {x.format} of {x.shape[1]}")
        self._lib.octavo_linear_int8(
            self._pool,
            ctypes.addressof(weight.native),
            x.q.data_ptr(),
            x.scale.data_ptr(),
            x.shape[0],
            x.format.zero_point,
            pointer(residual),
            y.data_ptr(),
        )

    def _float_product(self, x: Tensor, weight: PackedLinear, residual: Tensor | None, y: Tensor) -> None:
        if not isinstance(weight, CpuFloatLinear):
            raise ValueError(f"the weight multiplies {weight.format}, not floats")
        x = checked(x, torch.float32, (-1, weight.in_features), "x")
        self._lib.octavo_linear_float(
            self._pool,
            x.data_ptr(),
            weight.weight.data_ptr(),
            FLOAT_TYPES[weight.weight.dtype],
            x.shape[0],
            weight.in_features,
            weight.out_features,
            pointer(weight.bias),
            pointer(residual),
            y.data_ptr(),
        )


def _describe(
    parts: list[Tensor], *, has_zero_point: bool, has_bias: bool, shape: tuple[int, int], format: ActivationFormat
) -> CpuInt8Linear:
    """The native description of `parts`: packed, correction, scale, then the zero points and the bias if there are
    any.
    """
    native = Int8Weights(
        packed=parts[0].data_ptr(),
        correction=parts[1].data_ptr(),
        scale=parts[2].data_ptr(),
        zero_point=parts[3].data_ptr() if has_zero_point else None,
        bias=parts[-1].data_ptr() if has_bias else None,
        out_features=shape[0],
        in_features=shape[1],
        num_groups=parts[1].shape[0],
        limbs=format.limbs,
    )
    return CpuInt8Linear(shape[1], shape[0], format, tuple(parts), native)
