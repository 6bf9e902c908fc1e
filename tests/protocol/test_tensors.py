"""String tensors as bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.utils import serialize_byte_tensor

from octavo.protocol.answers import TokenOut, decode_answer, token_decoder
from octavo.protocol.tensors import pack_strings, unpack_strings


@given(items=st.lists(st.binary(max_size=20), max_size=5))
def test_what_is_packed_is_unpacked(items: list[bytes]) -> None:
    assert unpack_strings(pack_strings(items)) == items


def test_the_form_is_tritons() -> None:
    assert pack_strings([b"abc", b""]) == serialize_byte_tensor(np.array([b"abc", b""], dtype=object)).item()


@pytest.mark.parametrize("raw", [b"\1", b"\5\0\0\0abc"])
def test_lengths_that_do_not_add_up(raw: bytes) -> None:
    with pytest.raises(ValueError, match="ends inside"):
        unpack_strings(raw)


def test_what_is_written_is_read() -> None:
    import msgspec

    payload = msgspec.json.encode([TokenOut("r", "t", [1], 0, 0, 5, index=1)])
    assert decode_answer(payload) == {"req_id": "r", "token": "t", "token_ids": [1], "send_idx": 0, "is_end": 0,
                                      "infer_seed": 5, "index": 1}
    (message,) = token_decoder().decode(payload)
    assert (message.index, message.finish_reason) == (1, None)
