"""A carrier: one gRPC stream that carries the answers of all requests of a gateway worker.

A response through Triton costs the same however much is in it. So a worker opens a stream, sends `open` on it, and the
requests, each with a tag, as `carry` on the same stream; the front end answers all of them through the request of the
`open`, one response for everything that is pending. Orders are JSON in IN, what is carried is msgpack in OUT. Nobody
but the gateway speaks this; an order that cannot be followed is answered by an error object on its own request.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_WHOLE_BYTES = 48 << 20  # of one message: a larger one would break the stream for everyone on it
Tag = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # what msgpack can carry back
ORDER_PREFIX = b'{"carrier":'  # how every order begins: `Order` is written with its fields as declared


class Order(msgspec.Struct, omit_defaults=True):
    """What a worker asks of a carrier.

    open: answer here from now on. carry: run `body`, a request object, under `tag`. leave: nobody waits for `tag` any
    more. pause, resume: whoever reads `tag` is behind; its tokens and its end stay where they are meanwhile, and come
    in pieces afterwards. end: close the stream.
    """

    carrier: str
    op: str
    tag: Tag = 0
    body: msgspec.Raw = msgspec.Raw()


class Carried(msgspec.Struct, array_like=True, omit_defaults=True):
    """One message of the request `tag`: either new tokens of its only choice, or the whole message as OUT has it.

    The first message of a request is always whole, so the rest of what a token message says is known from it.
    """

    tag: int
    token: str = ""
    token_ids: list[int] = []
    send_idx: int = 0
    whole: bytes = b""  # JSON; b"": the fields above are the message
    more: bool = False  # what was held back goes on after this piece, once it is asked for with a `resume`


def order_decoder() -> msgspec.json.Decoder[Order]:
    """Raises msgspec.MsgspecError on anything but an order."""
    return msgspec.json.Decoder(Order)


def carried_encoder() -> msgspec.msgpack.Encoder:
    """For lists of `Carried`; not shared between threads."""
    return msgspec.msgpack.Encoder()


def carried_decoder() -> msgspec.msgpack.Decoder[list[Carried]]:
    """Raises msgspec.MsgspecError on anything else, the JSON of an error object among it."""
    return msgspec.msgpack.Decoder(list[Carried])
