"""Int32 words that hold four 8-bit values each, the first in the lowest byte. Runs while a model loads."""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.quantization.errors import CheckpointError
from octavo.quantization.formats.reader import type_name


def unpack(words: Tensor, name: str) -> Tensor:
    """[N, W] int32 words of values + 128 → [N, 4 · W] int8. Raises CheckpointError unless they are int32."""
    if words.dtype != torch.int32:
        raise CheckpointError(f"{name}: packed values are {type_name(words)}, int32 is needed")
    unsigned = words.contiguous().view(torch.uint8)  # little-endian, like every machine this runs on
    return unsigned.bitwise_xor(0x80).view(torch.int8)  # q + 128 and q differ in the top bit alone
