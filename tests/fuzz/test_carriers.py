"""Orders to a carrier that would break the thread that serves everyone."""

from __future__ import annotations

import pytest

from octavo.frontend.carriers import Carriers


class Silent:
    def send(self, payload: bytes, final: bool) -> None:
        pass

    def cancelled(self) -> bool:
        return False


@pytest.mark.parametrize("tag", ["-1", "9223372036854775808", "18446744073709551616", "1.5", '"1"', "null", "[]"])
def test_a_tag_that_cannot_be_sent_back_is_no_order(tag: str) -> None:
    """What is carried is msgpack: a larger number fails where the messages of all requests are written."""
    followed: list[bytes] = []
    carriers = Carriers(
        wake=lambda carrier: None,
        submit=lambda body, triton_id, sink: followed.append(body),
        wake_up=lambda sink: None,
        clock=lambda: 0.0,
    )
    assert carriers.follow(b'{"carrier":"a","op":"open"}', Silent())
    assert not carriers.follow(b'{"carrier":"a","op":"carry","tag":%s,"body":{}}' % tag.encode(), Silent())
    assert carriers.follow(b'{"carrier":"a","op":"carry","tag":7,"body":{}}', Silent())
    assert followed == [b"{}"]
