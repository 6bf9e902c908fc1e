"""A stand-in for Triton with the model behind it: ModelStreamInfer over real gRPC, answers that tests script.

It refuses what the native field table refuses. By default it says the words of `WORDS`, one a message, as the front
end would. Tests set the attributes of `FakeTriton` for anything else, and read what arrived from `requests`, `aborts`
and `cancelled`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from itertools import zip_longest

import grpc
from tritonclient.grpc import service_pb2

from octavo.protocol.answers import encode_error
from octavo.protocol.carrier import Carried, carried_encoder
from octavo.protocol.errors import InvalidRequest
from octavo.protocol.native import parse_request

WORDS = ["Hello", ",", " wor", "ld", " 世界", "!"]
PROMPT_WORDS = ["The", " cap", "ital"]
CONTEXT = 4096
SERVICE, METHOD = "inference.GRPCInferenceService", "ModelStreamInfer"


class Broken(Exception):
    """The whole stream ends here."""


def response_of(payload: bytes, final: bool) -> service_pb2.ModelStreamInferResponse:
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.raw_output_contents.append(len(payload).to_bytes(4, "little") + payload)
    response.infer_response.parameters["triton_final_response"].bool_param = final
    return response


class Stream:
    """One gRPC stream with what runs on it: requests, or a carrier and the requests that it carries."""

    def __init__(self, fake: FakeTriton, context: grpc.aio.ServicerContext, out: asyncio.Queue) -> None:
        self._fake, self._context, self._out = fake, context, out
        self._tasks: list[asyncio.Task] = []
        self._carried: dict[int, asyncio.Task] = {}
        self._going: dict[int, asyncio.Event] = {}  # by tag; not set: paused
        self._num_open = 1  # what keeps the stream open: the reading side and running requests

    async def read(self, requests: AsyncIterator) -> None:
        async for message in requests:
            assert message.model_name == "model"
            (raw,) = message.raw_input_contents
            assert int.from_bytes(raw[:4], "little") == len(raw) - 4
            if self._fake.triton_error is not None:
                await self._out.put(service_pb2.ModelStreamInferResponse(error_message=self._fake.triton_error))
                break
            request = json.loads(raw[4:])
            if request.get("op") in self._fake.refused_orders:
                self._fake.refused_orders.remove(request["op"])
                refused = service_pb2.ModelStreamInferResponse(error_message="no room")
                refused.infer_response.id = message.id
                await self._out.put(refused)
            elif "carrier" in request:
                self._order(request)
            else:
                self._run(request, None)
        await self._close_one()

    def _order(self, order: dict) -> None:
        self._fake.orders.append(order)
        op, tag = order["op"], order.get("tag", 0)
        if op == "open":
            self._num_open += 1
        elif op == "carry" and self._fake.lost_carriers:
            self._fake.lost_carriers -= 1
            self._tasks.append(asyncio.ensure_future(self._out.put(response_of(b'{"error_msg":"?"}', True))))
        elif op == "end":
            self._tasks.append(asyncio.ensure_future(self._close_one()))
        elif op == "carry":
            self._run(order["body"], tag)
        elif op == "leave":
            if tag in self._carried:
                self._carried[tag].cancel()
        elif op in ("pause", "resume"):
            (self._going[tag].clear if op == "pause" else self._going[tag].set)()
        else:
            raise AssertionError(f"unknown order {op}")

    def _run(self, request: dict, tag: int | None) -> None:
        answers = self._fake._op(request) if "op" in request else self._fake._generate(request)
        self._num_open += tag is None
        task = asyncio.ensure_future(self._answer(answers, tag))
        self._tasks.append(task)
        if tag is not None:
            self._carried[tag], self._going[tag] = task, asyncio.Event()
            self._going[tag].set()

    async def _answer(self, answers: AsyncIterator, tag: int | None) -> None:
        try:
            async with aclosing(answers):
                async for payload, final in answers:
                    if tag is None:
                        await self._out.put(response_of(payload, final))
                    else:
                        await self._going[tag].wait()
                        await self._out.put(response_of(carried_encoder().encode([carried(tag, payload)]), False))
        except Broken as broken:
            await self._out.put(broken)
        if tag is None:
            await self._close_one()

    async def _close_one(self) -> None:
        self._num_open -= 1
        if not self._num_open:
            await self._out.put(None)

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def carried(tag: int, payload: bytes) -> Carried:
    """As the front end puts it: messages after the first that say no more than their tokens are bare."""
    value = json.loads(payload)
    bare = {"req_id", "token", "token_ids", "send_idx", "is_end", "infer_seed"}
    if isinstance(value, list) and set(value[0]) == bare and not value[0]["is_end"] and value[0]["send_idx"]:
        return Carried(tag, value[0]["token"], value[0]["token_ids"], value[0]["send_idx"])
    return Carried(tag, whole=payload)


class FakeTriton:
    """The server; every attribute may be set by a test at any time."""

    def __init__(self) -> None:
        self.port = 0
        self.requests: list[dict] = []
        self.ops: list[dict] = []
        self.aborts: list[str] = []
        self.cancelled: list[str] = []
        self.orders: list[dict] = []  # to carriers
        self._running: dict[str, tuple[dict, asyncio.Event]] = {}
        self._server: grpc.aio.Server | None = None
        self.reset()

    def reset(self) -> None:
        self.words = list(WORDS)
        self.delay = 0.0
        self.first_delay = 0.0
        self.state = "ready"
        self.info: dict = {}  # more of the answer to op info
        self.times: dict | None = None  # for requests that ask for a benchmark
        self.error: dict | None = None  # answered in place of the message at `error_at`
        self.error_at = 0
        self.breaks: list[int] = []  # messages after which the stream of each further attempt breaks
        self.triton_error: str | None = None
        self.stall_on: Callable[[dict], bool] = lambda request: False
        self.disable_streaming = False
        self.num_bytes = 0  # sent
        self.refused_orders: list[str] = []  # ops that Triton cannot pass on, once for each
        self.lost_carriers = 0  # how many of the next requests come on a carrier that is not known
        for log in (self.requests, self.ops, self.aborts, self.cancelled, self.orders):
            log.clear()

    # ---- life

    async def start(self, port: int = 0) -> None:
        handler = grpc.stream_stream_rpc_method_handler(
            self._infer,
            request_deserializer=service_pb2.ModelInferRequest.FromString,
            response_serializer=service_pb2.ModelStreamInferResponse.SerializeToString,
        )
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 1 << 28)])
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port or self.port}")
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(grace=0)

    # ---- requests

    async def _infer(self, requests: AsyncIterator, context: grpc.aio.ServicerContext) -> AsyncIterator:
        """Each message of the stream is a request of its own; their answers mix, as they do in Triton."""
        out: asyncio.Queue = asyncio.Queue(1)
        stream = Stream(self, context, out)
        reading = asyncio.ensure_future(stream.read(requests))
        try:
            while (response := await out.get()) is not None:
                if isinstance(response, Exception):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
                self.num_bytes += response.ByteSize()
                yield response
        finally:
            await stream.end()
            reading.cancel()

    async def _op(self, request: dict) -> AsyncIterator[tuple[bytes, bool]]:
        self.ops.append(request)
        op, answer = request["op"], {}
        if op == "abort":
            self.aborts.append(request["req_id"])
            answer = {"req_id": request["req_id"], "aborted": self._abort(request)}
        elif op == "info":
            answer = {"state": self.state, "reason": "", "model": {"context_length": CONTEXT}, "engine": None}
            answer |= self.info
        elif op == "tokenize":
            text = request.get("text") or "".join(one["content"] for one in request["messages"])
            answer = {"req_id": request["req_id"], "tokens": [ord(one) for one in text], "token_strs": list(text)}
            answer |= {"count": len(text), "max_model_len": CONTEXT}
        elif op == "detokenize":
            answer = {"text": "".join(map(chr, request["tokens"]))}
        yield json.dumps(answer).encode(), True

    def _abort(self, order: dict) -> bool:
        """As the front end does: an order that names an owner is for that owner's request alone."""
        request, aborted = self._running.get(order["req_id"], ({}, None))
        if aborted is None or order.get("owner") not in (None, request.get("owner")):
            return False
        aborted.set()
        return True

    async def _generate(self, request: dict) -> AsyncIterator[tuple[bytes, bool]]:
        self.requests.append(request)
        req_id = request["req_id"]
        try:
            parse_request(request)
        except InvalidRequest as error:
            yield encode_error(error, req_id), True
            return
        mine = self._running[req_id] = (request, aborted := asyncio.Event())
        break_at = self.breaks.pop(0) if self.breaks else None
        sent = 0
        try:
            with suppress(asyncio.TimeoutError):
                if self.first_delay:
                    await asyncio.wait_for(aborted.wait(), self.first_delay)
            for message in self._messages(request):
                if break_at == sent:
                    raise Broken
                if self.error is not None and sent == self.error_at:
                    yield json.dumps({"req_id": req_id, **self.error}).encode(), True
                    return
                if self.delay or self.stall_on(request):
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(aborted.wait(), self.delay or 30.0)
                if aborted.is_set():
                    message |= {"is_end": 1, "finish_reason": "cancelled", "tokens_all": "", "tokens_all_num": 0}
                sent += 1
                yield json.dumps([message], ensure_ascii=False, separators=(",", ":")).encode(), bool(message["is_end"])
                if aborted.is_set():
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(req_id)
            raise
        finally:
            if self._running.get(req_id) is mine:
                del self._running[req_id]

    def _messages(self, request: dict) -> list[dict]:
        """All messages of a request, the choices taking turns."""
        n = request.get("n", 1)
        choices = [self._choice(request, index, n) for index in range(n)]
        return [one for turn in zip_longest(*choices) for one in turn if one is not None]

    def _choice(self, request: dict, index: int, n: int) -> list[dict]:
        words = self.words[: parse_request(request).max_dec_len]
        had = request.get("generated_token_ids", [])
        had, idx = (had[index], request["send_idx"][index]) if n > 1 and had else (had, request.get("send_idx", 0))
        messages = [self._message(request, index, n, at, word) for at, word in enumerate(words)]
        messages = messages[len(had) :]
        for offset, message in enumerate(messages):
            message["send_idx"] = idx + offset
        if not request.get("generated_token_ids"):
            self._add_prompt(request, messages[0])
        last = messages[-1]
        ids = [1000 + at for at in range(len(words))]
        reason = "stop" if len(words) == len(self.words) else "length"
        usage = {"prompt_tokens": 3, "completion_tokens": len(words), "total_tokens": 3 + len(words)}
        usage["prompt_tokens_details"] = {"cached_tokens": 2}
        last |= {"is_end": 1, "finish_reason": reason, "tokens_all": "".join(words), "tokens_all_num": len(words)}
        last |= {"usage": usage, "fingerprint": "f1"}
        if request.get("return_all_tokens"):
            last["tokens_all_ids"] = ids
        if request.get("benchmark") and self.times is not None:
            last["times"] = self.times
        if self.disable_streaming:
            return [last | {"token": "".join(words), "token_ids": ids, "send_idx": 0}]
        return messages

    def _message(self, request: dict, index: int, n: int, at: int, word: str) -> dict:
        message = {"req_id": request["req_id"], "token": word, "token_ids": [1000 + at], "send_idx": at, "is_end": 0}
        message["infer_seed"] = request.get("infer_seed", request.get("seed", 0))
        if n > 1:
            message["index"] = index
        if request.get("logprobs") is not None:
            message["logprobs"] = [scored(1000 + at, word, request["logprobs"])]
        return message

    def _add_prompt(self, request: dict, message: dict) -> None:
        if request.get("return_prompt"):
            message |= {"prompt": "".join(PROMPT_WORDS), "prompt_token_ids": [1, 2, 3]}
        if request.get("prompt_logprobs") is not None:
            scores = [scored(at + 1, word, request["prompt_logprobs"]) for at, word in enumerate(PROMPT_WORDS)]
            message["prompt_logprobs"] = [None, *scores[1:]]


def scored(token_id: int, token: str, count: int) -> dict:
    """A log probability with `count` alternatives."""
    top = [{"id": token_id + at, "token": f"{token}{'~' * at}", "logprob": -0.25 - at} for at in range(count)]
    return {"id": token_id, "token": token, "logprob": -0.25, "rank": 1, "top": top}
