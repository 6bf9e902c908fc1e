"""Ops, metrics, the log line, and model.py with a stand-in for Triton's module."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes import triton_python_backend_utils as stand_in
from frontend.conftest import House, wait_for
from octavo.frontend.engine_process import find_python
from octavo.frontend.reporting import clean
from octavo.frontend.sink import SinkClosed

MODEL_PY = Path(__file__).resolve().parents[2] / "model_repository" / "model" / "1" / "model.py"


def samples(text: str) -> dict[str, float]:
    return {sample.name + str(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def test_info_tells_state_model_and_limits(house: House) -> None:
    house.ready(num_blocks=77)
    info = house.op("info")
    assert (info["state"], info["model"]["num_blocks"], info["limits"]["batch_size"]) == ("ready", 77, 8)
    assert info["engine_age"] < 5
    assert info["frontend"]["epoch"] > 0


def test_tokenize_and_detokenize(house: House) -> None:
    house.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    house.ready()
    answer = house.op("tokenize", text="hé", req_id="t")
    assert answer == {"tokens": [104, 195, 169], "token_strs": ["h", "Ã", "©"], "count": 3, "max_model_len": 4096,
                      "req_id": "t"}
    assert house.op("detokenize", tokens=[104, 195, 169])["text"] == "hé"
    messages = [{"role": "user", "content": "x"}]
    assert house.op("tokenize", messages=messages)["count"] == 3
    assert house.op("tokenize")["error_code"] == 400
    assert house.op("detokenize", tokens="x")["error_code"] == 400
    assert house.op("nonsense")["error_msg"].startswith("op must be one of info, metrics")
    assert house.op("abort")["error_code"] == 400


def test_metrics_count_what_happened(house: House) -> None:
    house.environ["SERVED_MODEL_NAME"] = "m"
    house.ready(num_blocks=100)
    house.ask(text="hello", req_id="a", max_dec_len=10)
    house.ask(text="hi", req_id="a", topp=7)
    found = samples(house.op("metrics")["text"])
    model = "('model_name', 'm')"
    assert found["octavo_prompt_tokens_total[]"] == found[f"vllm:prompt_tokens_total[{model}]"] == 5
    assert found["octavo_generation_tokens_total[]"] == found[f"vllm:generation_tokens_total[{model}]"] == 10
    assert found[f"vllm:request_success_total[('finished_reason', 'length'), {model}]"] == 1
    assert found["octavo_errors_total[('code', '400')]"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"vllm:{name}_seconds_count[{model}]"] == found[f"octavo_{name}_seconds_count[]"] == 1
    assert found["octavo_inter_token_latency_seconds_count[]"] <= 9
    assert found["octavo_inter_token_latency_seconds_bucket[('le', '+Inf')]"] <= 9
    assert (found["max_batch_size[]"], found["max_block_num[]"], found["available_resource[]"]) == (8, 100, 1)
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        assert found[f"octavo_{name}_total[]"] == found[f"vllm:spec_decode_num_{name}_total[{model}]"] == 0
    for name in ("num_requests_running", "num_requests_waiting", "gpu_cache_usage_perc", "kv_cache_usage_perc"):
        assert found[f"vllm:{name}[{model}]"] == 0
    assert {"batch_size[]", "block_num[]"} <= set(found)


def test_one_log_line_a_request_without_its_text(house: House, caplog: pytest.LogCaptureFixture) -> None:
    house.environ["MAX_SEQ_LEN"] = "4096"
    caplog.set_level(logging.INFO, "octavo.frontend")
    house.ready()
    house.ask(text="very secret", req_id="a\nb c", max_dec_len=3)
    wait_for(lambda: bool(caplog.messages))
    (line,) = caplog.messages
    assert line.startswith("request a\\x0ab\\x20c length prompt=11 output=3")
    assert "secret" not in line


def test_ids_are_cleaned() -> None:
    assert clean("x" * 100) == "x" * 64 + "…"
    assert clean("a\x1b[31m\u202e") == "a\\x1b[31m\\x202e"
    assert clean(None) == "-"


def test_the_interpreter_is_found() -> None:
    assert Path(find_python()).resolve() == Path(sys.executable).resolve()


@pytest.fixture
def model(house: House, monkeypatch: pytest.MonkeyPatch):
    """model.py as the stub loads it, with a model folder for its tokenizer."""
    from text.vocabularies import bytes_only, write_folder

    folder = write_folder(house.run_dir.parent / "model", bytes_only(), chat_template=None)
    for name, value in {"RUN_DIR": str(house.run_dir), "INFER_QUEUE_PORT": str(house.port), "OCTAVO_NODE": "1",
                        "MODEL_DIR": str(folder), "MAX_BODY_BYTES": "5000"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    spec = importlib.util.spec_from_file_location("octavo_model", MODEL_PY)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "octavo_model", module)
    spec.loader.exec_module(module)
    made = module.TritonPythonModel()
    made.initialize({})
    yield made
    made.finalize()


def run(model, *bodies: bytes, request_id: str = "") -> list[list]:
    requests = [stand_in.InferenceRequest(body, request_id) for body in bodies]
    assert model.execute(requests) is None
    out = []
    for request in requests:
        messages = []
        while not messages or not messages[-1][1]:
            messages.append(request.sender.sent.get(timeout=5))
        out.append([json.loads(payload) for payload, _ in messages])
    return out


def test_model_py_streams_through_triton(house: House, model) -> None:
    house.engine()
    wait_for(lambda: run(model, b'{"op": "info"}')[0][0]["state"] == "ready")
    body = b'[{"text": "hi", "max_dec_len": 4, "infer_seed": 1}]'
    (messages,) = run(model, body, request_id="from-triton")
    assert messages[-1][0]["is_end"] == 1
    assert messages[-1][0]["req_id"] == "from-triton"
    both = run(model, body.replace(b"}", b', "req_id": "x"}'), b'{"text": "hi", "req_id": "y", "topp": "x"}')
    assert both[0][-1][0]["finish_reason"] == "length"
    assert both[1] == [{"error_msg": "topp must be a number, not a string", "error_code": 400, "req_id": "y",
                        "error_field": "topp"}]
    assert run(model, b"x" * 6000)[0][0]["error_code"] == 413


def test_model_py_lets_the_sender_go_with_the_last_message(model) -> None:
    """Triton waits for every sender before it unloads the model."""
    sink = sys.modules[type(model).__module__].ResponseSink(stand_in.InferenceRequest(b""))
    sink.send(b"1", False)
    assert not sink.cancelled()
    sink.send(b"2", True)
    assert sink._sender is None
    assert sink.cancelled()
    with pytest.raises(SinkClosed):
        sink.send(b"3", True)


def test_model_py_hears_a_cancellation(house: House, model) -> None:
    house.engine(rate=50)
    wait_for(lambda: run(model, b'{"op": "info"}')[0][0]["state"] == "ready")
    request = stand_in.InferenceRequest(b'{"text": "hi", "req_id": "a"}')
    model.execute([request])
    request.sender.sent.get(timeout=5)
    request.sender.is_gone = True
    wait_for(lambda: house.engines[0].aborted == [1])
