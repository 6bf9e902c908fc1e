"""Whatever comes in, the answer is one of the errors of the list, and nobody else notices.

The quick forms are a few hundred cases. `OCTAVO_FUZZ_CASES=100000 pytest tests/fuzz -m slow` is a long night.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2, service_pb2_grpc

from fuzz import strategies
from fuzz.conftest import SLOW_CASES, Neighbour
from server.conftest import Server

PATHS = (
    "/v1/chat/completions",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/chat/completions/chat/completions",
    "/v1/chat/completions/completions",
    "/tokenize",
    "/detokenize",
    "/v1/abort",
)
GOOD = {200, 400, 404, 408, 409, 413, 429, 499}
BAD_CODES = (500, 503)
SECONDS = 60.0
Cases = Callable[[int], settings]


def cases(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=count < 1000,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.fixture
def http(fuzzed: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fuzzed.gateway, timeout=SECONDS, trust_env=False) as client:
        yield client


def check_answer(answer: httpx.Response) -> None:
    """A status of the list, and JSON that says no more than the list does."""
    assert answer.status_code in GOOD, (answer.status_code, answer.text[:300])
    for line in answer.text.splitlines():
        data = line.removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        value = json.loads(data)
        assert value.get("error_code", 0) not in BAD_CODES, value
        error = value.get("error") or {}
        assert error.get("type") not in ("server_error", "service_unavailable_error"), value


def ask_http(http: httpx.Client, path: str, raw: bytes) -> None:
    check_answer(http.post(path, content=raw, headers={"content-type": "application/json"}))


@cases(150)
@given(path=st.sampled_from(PATHS), body=strategies.bodies)
def test_bodies_over_http(neighbour: Neighbour, http: httpx.Client, path: str, body: object) -> None:
    ask_http(http, path, strategies.text_of(body))


@cases(100)
@given(path=st.sampled_from(PATHS), raw=strategies.raw_bodies)
def test_broken_bodies_over_http(neighbour: Neighbour, http: httpx.Client, path: str, raw: bytes) -> None:
    ask_http(http, path, raw)


@pytest.mark.slow
@cases(SLOW_CASES // 3)
@given(path=st.sampled_from(PATHS), raw=strategies.bodies.map(strategies.text_of) | strategies.raw_bodies)
def test_many_bodies_over_http(neighbour: Neighbour, http: httpx.Client, path: str, raw: bytes) -> None:
    ask_http(http, path, raw)


class Raw:
    """Triton as it stands on GRPC_PORT."""

    def __init__(self, target: str) -> None:
        options = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
        self.channel = grpc.insecure_channel(target, options=options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def ask(self, request: service_pb2.ModelInferRequest) -> list[str]:
        """All answers of a stream with one request; Triton's own refusal is an answer too."""
        try:
            responses = list(self.stub.ModelStreamInfer(iter([request]), timeout=SECONDS))
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise
            return [error.details() or ""]
        return [text for response in responses for text in answers_in(response)]


def answers_in(response: service_pb2.ModelStreamInferResponse) -> list[str]:
    contents = response.infer_response.raw_output_contents
    return (
        [response.error_message] if response.error_message else [raw[4:].decode(errors="replace") for raw in contents]
    )


@pytest.fixture
def raw(fuzzed: Server) -> Iterator[Raw]:
    made = Raw(fuzzed.grpc)
    yield made
    made.channel.close()


def check_texts(texts: list[str]) -> None:
    for text in texts:
        assert '"error_code":500' not in text, text
        assert '"error_code":503' not in text, text
        assert "shm" not in text, "names of shared memory are nobody's business"
        assert "Traceback" not in text


@cases(250)
@given(request=strategies.tensors())
def test_tensors_over_grpc(neighbour: Neighbour, raw: Raw, request: service_pb2.ModelInferRequest) -> None:
    check_texts(raw.ask(request))


@cases(40)
@given(orders=st.lists(strategies.carrier_orders, max_size=8))
def test_orders_to_a_carrier(neighbour: Neighbour, raw: Raw, orders: list[dict]) -> None:
    """The gateway's own protocol, spoken by someone else: opened, then anything, on one stream that just goes away."""
    spoken = [{"carrier": "fuzz", "op": "open"}, *orders, {"carrier": "fuzz", "op": "end"}]
    call = raw.stub.ModelStreamInfer(iter([in_tensor(strategies.order_text(one)) for one in spoken]), timeout=0.3)
    with contextlib.suppress(grpc.RpcError):
        for response in call:
            assert "shm" not in response.error_message
    info = json.loads(raw.ask(in_tensor(b'{"op": "info"}'))[0])
    assert info["state"] == "ready"


@pytest.mark.slow
@cases(SLOW_CASES * 2 // 3)
@given(request=strategies.tensors())
def test_many_tensors_over_grpc(neighbour: Neighbour, raw: Raw, request: service_pb2.ModelInferRequest) -> None:
    check_texts(raw.ask(request))


def in_tensor(text: bytes) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="model", id="odd")
    request.inputs.add(name="IN", datatype="BYTES").shape.append(1)
    request.raw_input_contents.append(strategies.framed(text))
    return request


ODD = {
    "deep list": b'{"text": "x", "model": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "deep object": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "open": b"[" * 1_000_000,
    "long number": b'{"text": "x", "max_dec_len": ' + b"9" * 100_000 + b"}",
    "long exponent": b'{"text": "x", "temperature": 1e' + b"9" * 10_000 + b"}",
    "nan": b'{"text": "x", "temperature": NaN}',
    "surrogate": b'{"text": "a \\ud800 b"}',
    "invalid utf-8": b'{"text": "\xff\xfe"}',
    "overlong utf-8": b'{"text": "\xc0\xaf"}',
    "nul": b"\x00" * 100,
    "many keys": json.dumps({"text": "x", **{f"k{number}": number for number in range(50_000)}}).encode(),
    "too large": b'{"text": "' + b"x" * (5 << 20) + b'"}',
    "too many stops": json.dumps({"text": "x", "stop": ["a"] * 17}).encode(),
    "too many biases": json.dumps({"text": "x", "logit_bias": {str(key): 1 for key in range(1025)}}).encode(),
    "too many messages": json.dumps({"messages": [{"role": "user", "content": "x"}] * 4097}).encode(),
    "too many choices": b'{"text": "x", "n": 129, "stream": true}',
    "too long a prompt": json.dumps({"input_ids": [5] * 2000}).encode(),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_bodies_are_refused_on_every_road(fuzzed: Server, http: httpx.Client, raw: Raw, name: str) -> None:
    answer = http.post("/v1/chat/completions", content=ODD[name])
    assert answer.status_code in (400, 413) or name == "many keys", answer.text[:300]
    check_answer(answer)
    texts = raw.ask(in_tensor(ODD[name]))
    check_texts(texts)
    if name != "many keys":
        (error,) = [json.loads(text) for text in texts]
        assert error["error_code"] in (400, 413)
        assert len(error["error_msg"]) < 400


def test_doors_of_triton_that_lead_elsewhere_are_shut(fuzzed: Server, raw: Raw) -> None:
    """Shared memory of other processes, loading of models, logs, traces: the remote attacks on this backend."""
    region = service_pb2.SystemSharedMemoryRegisterRequest(name="x", key="/x", byte_size=8)
    calls = [
        (raw.stub.SystemSharedMemoryRegister, region),
        (raw.stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
        (raw.stub.CudaSharedMemoryStatus, service_pb2.CudaSharedMemoryStatusRequest()),
        (raw.stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
        (raw.stub.RepositoryModelLoad, service_pb2.RepositoryModelLoadRequest(model_name="model")),
        (raw.stub.RepositoryModelUnload, service_pb2.RepositoryModelUnloadRequest(model_name="model")),
        (raw.stub.ModelConfig, service_pb2.ModelConfigRequest(name="model")),
        (raw.stub.ModelStatistics, service_pb2.ModelStatisticsRequest(name="model")),
        (raw.stub.LogSettings, service_pb2.LogSettingsRequest()),
        (raw.stub.TraceSetting, service_pb2.TraceSettingRequest()),
    ]
    for call, request in calls:
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "restricted" in refused.value.details()
