"""The tensors of the Triton model as bytes: names, and the length-prefixed form of TYPE_STRING elements.

For gRPC callers that use `raw_input_contents` and `raw_output_contents` without tritonclient or numpy.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

MODEL_NAME = "model"
INPUT_NAME = "IN"
OUTPUT_NAME = "OUT"
DATATYPE = "BYTES"
FINAL_PARAMETER = "triton_final_response"  # a bool parameter of each response

_LENGTH = struct.Struct("<I")


def pack_strings(items: Iterable[bytes]) -> bytes:
    """Each item after its length as a little-endian 32-bit number."""
    return b"".join(part for item in items for part in (_LENGTH.pack(len(item)), item))


def unpack_strings(raw: bytes) -> list[bytes]:
    """The items that `pack_strings` packed. Raises ValueError if the lengths do not add up."""
    items, position = [], 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise ValueError("a string tensor ends inside a length")
        (size,) = _LENGTH.unpack_from(raw, position)
        position += 4
        if position + size > len(raw):
            raise ValueError("a string tensor ends inside an element")
        items.append(raw[position : position + size])
        position += size
    return items
