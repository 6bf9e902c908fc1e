"""A request from body to last message, on a fake engine."""

from __future__ import annotations

import threading
import time

import pytest

from fakes.engine import default_token
from frontend.conftest import House, Inbox, wait_for
from octavo.frontend.lowering import mix
from octavo.protocol import messages as m

END = 257


def script(text: str, *, end: bool = True):
    """An engine that says `text`, then its end token."""
    raw = text.encode()
    return lambda submit, position: raw[position] if position < len(raw) else END if end else 46


def check_stream(messages: list[dict]) -> dict:
    """The rules that every good stream obeys; returns the last message."""
    assert [message["send_idx"] for message in messages] == list(range(len(messages)))
    assert [message["is_end"] for message in messages] == [0] * (len(messages) - 1) + [1]
    last = messages[-1]
    assert "".join(message["token"] for message in messages) == last["tokens_all"]
    assert sum(len(message["token_ids"]) for message in messages) == last["tokens_all_num"]
    assert not any("error_msg" in message for message in messages)
    return last


def test_a_request_streams_and_ends_with_its_totals(house: House) -> None:
    house.ready(token_of=script("Hello wörld"), end_token_ids=(END,), rate=200)
    messages = house.ask(text="hi", req_id="a", return_all_tokens=True, benchmark=True)
    last = check_stream(messages)
    assert last["tokens_all"] == "Hello wörld"
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", END)
    assert last["tokens_all_num"] == 12
    assert last["tokens_all_ids"] == list("Hello wörld".encode())
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 13, "total_tokens": 15,
                             "prompt_tokens_details": {"cached_tokens": 0}}
    assert last["times"]["e2e_s"] >= last["times"]["ttft_s"] > 0
    assert messages[0]["fingerprint"] == last["fingerprint"] == "fake-1"
    assert any("ö" in message["token"] for message in messages), "its two bytes leave together"


def test_length_ends_a_request(house: House) -> None:
    house.ready()
    last = check_stream(house.ask(text="hi", req_id="a", max_dec_len=5, infer_seed=3))
    assert last["finish_reason"] == "length"
    assert "stop_reason" not in last
    submit = m.Submit(0, [], m.SamplingParams(5, seed=3))
    assert last["tokens_all"] == bytes(default_token(submit, k) for k in range(5)).decode()


def test_the_seed_is_told_and_gives_the_same_answer(house: House) -> None:
    house.ready()
    first = house.ask(text="hi", req_id="a", max_dec_len=20)
    seed = first[0]["infer_seed"]
    again = house.ask(text="hi", req_id="a", max_dec_len=20, infer_seed=seed)
    assert first[-1]["tokens_all"] == again[-1]["tokens_all"]
    assert house.ask(text="hi", req_id="b", max_dec_len=2, infer_seed=-1)[0]["infer_seed"] == 2**64 - 1


def test_native_defaults_reach_the_engine(house: House) -> None:
    house.ready(end_token_ids=(END,))
    house.ask(text="hi", req_id="a", max_dec_len=3, eos_token_ids=[7])
    params = house.engines[0].submitted[0].params
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.95, 0.7, 0, 1.0)
    assert params.end_token_ids == (7, END)
    house.ask(text="hi", req_id="a", max_dec_len=3, ignore_eos=True, logit_bias={"5": -100})
    params = house.engines[0].submitted[1].params
    assert (params.end_token_ids, params.logit_bias) == ((), {5: -100.0})


@pytest.mark.parametrize(("given", "told"), [(None, None), (True, True), (False, False)])
def test_a_request_says_whether_it_speculates(house: House, given: bool | None, told: bool | None) -> None:
    house.ready()
    house.ask(text="hi", req_id="a", max_dec_len=3, speculation=given)
    assert house.engines[0].submitted[0].params.speculation is told


@pytest.mark.parametrize(
    ("fields", "tenant"),
    [({}, ""), ({"tenant": "10.0.0.7"}, "10.0.0.7"), ({"key": "k1"}, "k1"), ({"key": "k1", "tenant": "t"}, "t")],
)
def test_the_engine_is_told_whose_turn_a_request_takes(house: House, fields: dict, tenant: str) -> None:
    house.ready()
    house.ask(text="hi", req_id="a", max_dec_len=3, priority=-2, **fields)
    submit = house.engines[0].submitted[0]
    assert (submit.tenant, submit.priority) == (tenant, -2)


def test_openai_defaults_come_from_the_model(house: House) -> None:
    house.generation_config = {"temperature": 0.6, "top_k": 20, "eos_token_id": [3, END], "top_p": 7}
    house.ready()
    house.ask(text="hi", req_id="a", dialect="openai", max_dec_len=100_000)
    params = house.engines[0].submitted[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 1.0, 20)
    assert params.end_token_ids == (3, END)
    assert params.max_tokens == 512


def test_a_stop_string_ends_the_request_and_the_engine_is_told(house: House) -> None:
    house.ready(token_of=script("one two STOP three", end=False), rate=500)
    last = check_stream(house.ask(text="hi", req_id="a", stop=["STOP", "never"]))
    assert (last["tokens_all"], last["finish_reason"], last["stop_reason"]) == ("one two ", "stop", "STOP")
    assert last["usage"]["completion_tokens"] == 12
    wait_for(lambda: house.engines[0].aborted == [1])
    assert house.op("info")["frontend"]["running"] == 0


def test_n_choices_have_seeds_of_their_own(house: House) -> None:
    house.ready()
    messages = house.ask(text="hi", req_id="a", n=3, max_dec_len=6, infer_seed=11)
    for index in range(3):
        last = check_stream([message for message in messages if message["index"] == index])
        submit = m.Submit(0, [], m.SamplingParams(6, seed=mix(11, index)))
        assert last["tokens_all"] == bytes(default_token(submit, k) for k in range(6)).decode()
    assert mix(11, 0) == 11
    assert len({mix(11, index) for index in range(100)}) == 100


def test_logprobs_are_aligned_with_tokens(house: House) -> None:
    house.ready(token_of=script("aö", end=True), end_token_ids=(END,))
    messages = house.ask(text="hey", req_id="a", logprobs=2, prompt_logprobs=1, return_prompt=True)
    check_stream(messages)
    for message in messages:
        assert [entry["id"] for entry in message["logprobs"]] == message["token_ids"]
    entry = messages[0]["logprobs"][0]
    assert entry == {"id": 97, "token": "a", "logprob": -0.5, "rank": 1,
                     "top": [{"id": 65, "token": "A", "logprob": -1.0}, {"id": 66, "token": "B", "logprob": -2.0}]}
    assert (messages[0]["prompt"], messages[0]["prompt_token_ids"]) == ("hey", list(b"hey"))
    assert [entry and entry["token"] for entry in messages[0]["prompt_logprobs"]] == [None, "e", "y"]


def test_templates_apply_unless_the_text_is_raw(house: House) -> None:
    house.chat_template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    house.ready()
    for body in ({"text": "hi"}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]},
                 {"text": "hi", "system": "be"}, {"text": "hi", "raw_text": True}, {"input_ids": [1, 2]}):
        house.ask(req_id="a", max_dec_len=1, **body)
    prompts = [bytes(submit.prompt_token_ids) for submit in house.engines[0].submitted]
    assert prompts == [b"[user:hi]", b"[user:hi]", b"[system:be][user:hi]", b"hi", b"\1\2"]


def test_messages_need_a_template(house: House) -> None:
    house.ready()
    (error,) = house.ask(messages=[{"role": "user", "content": "x"}], req_id="a")
    assert error["error_code"] == 400
    assert "no chat template" in error["error_msg"]


def test_only_the_last_message_without_streaming(house: House) -> None:
    house.environ["DISABLE_STREAMING"] = "1"
    house.ready(token_of=script("Hello"), end_token_ids=(END,))
    (message,) = house.ask(text="hi", req_id="a", logprobs=0)
    assert (message["token"], message["token_ids"], message["send_idx"]) == ("Hello", list(b"Hello"), 0)
    assert (message["is_end"], message["tokens_all"]) == (1, "Hello")
    assert len(message["logprobs"]) == 5


def test_tokens_are_coalesced_when_the_sender_is_behind(house: House) -> None:
    house.ready()
    gate = threading.Event()

    class Slow(Inbox):
        def send(self, payload: bytes, final: bool) -> None:
            super().send(payload, final)
            gate.wait(5)

    inbox = Slow()
    house.frontend.submit(b'{"text": "hi", "req_id": "a", "max_dec_len": 400}', "", inbox)
    wait_for(lambda: house.engines[0].num_tokens >= 400)
    time.sleep(0.1)  # for the last of them to arrive
    gate.set()
    messages = inbox.all()
    check_stream(messages)
    assert len(messages) <= 2  # the first went alone, unless all 400 tokens were there before it


def test_a_req_id_is_free_before_the_last_message(house: House) -> None:
    house.ready()
    seen = []

    class Checking:
        def send(self, payload: bytes, final: bool) -> None:
            seen.append((final, house.frontend.registry.find("a") is None))

        def cancelled(self) -> bool:
            return False

    house.frontend.submit(b'{"text": "hi", "req_id": "a", "max_dec_len": 3}', "", Checking())
    wait_for(lambda: bool(seen) and seen[-1][0])
    assert seen[-1] == (True, True)
    assert all(free == final for final, free in seen)


def test_the_triton_id_is_the_fallback(house: House) -> None:
    house.ready()
    inbox = Inbox()
    house.frontend.submit(b'[{"text": "hi", "max_dec_len": 1}]', "triton-7", inbox)
    assert inbox.all()[-1]["req_id"] == "triton-7"
    (error,) = house.ask(text="hi")
    assert error["error_msg"] == "req_id is needed, in IN or as the request id"


@pytest.mark.parametrize(("body", "code", "message"), [
    ({"max_dec_len": 9000}, 400, "max_dec_len (9000) exceeds MAX_DEC_LEN (512)"),
    ({"min_dec_len": 600}, 400, "min_dec_len (600) exceeds MAX_DEC_LEN (512)"),
    ({"min_dec_len": 9, "max_dec_len": 3}, 400, "min_dec_len (9) exceeds max_dec_len (3)"),
    ({"topp": 1.5}, 400, "topp (1.5) must be in [0, 1]"),
    ({"text": "x" * 3000}, 400, "input (3000 tokens) exceeds MAX_SEQ_LEN (2048)"),
    ({"text": "x" * 1800, "max_dec_len": 300}, 400,
     "input (1800 tokens) + max_dec_len (300) exceeds the model's context (2048)"),
    ({"text": ""}, 400, "the prompt has no tokens"),
    ({"text": None, "input_ids": [9999]}, 400, "input_ids: token id 9999 is not in the vocabulary of 512"),
    ({"generated_token_ids": [600]}, 400, "generated_token_ids: token id 600 is not in the vocabulary of 512"),
    ({"fingerprint": "other"}, 400, "fingerprint: the tokens come from another model or other settings"),
])
def test_refusals_say_what_is_wrong(house: House, body: dict, code: int, message: str) -> None:
    house.ready(context_length=2048)
    (error,) = house.ask(**{"text": "hi", "req_id": "a", **body})
    assert (error["error_code"], error["error_msg"], error["req_id"]) == (code, message, "a")
    assert not house.engines[0].submitted


def test_what_never_fits_the_cache_is_refused(house: House) -> None:
    house.ready(num_blocks=4)
    (error,) = house.ask(text="x" * 200, req_id="a", max_dec_len=100)
    assert error["error_type"] == "context_length_exceeded"
    assert "never fit the cache (256 tokens)" in error["error_msg"]
    assert house.ask(text="x" * 200, req_id="a", max_dec_len=100, dialect="openai")[-1]["tokens_all_num"] == 56
    (error,) = house.ask(text="x" * 256, req_id="a", dialect="openai")
    assert error["error_type"] == "context_length_exceeded"


def test_bodies_that_are_no_request(house: House) -> None:
    house.environ["MAX_BODY_BYTES"] = "2000"
    house.ready()
    for body, code in ((b"{", 400), (b"[]", 400), (b"[1]", 400), (b'"op"', 400), (b"x" * 3000, 413),
                       (b'{"op": "nonsense"}', 400), (b"\xff", 400), (b"[" * 1500, 400)):
        inbox = Inbox()
        house.frontend.submit(body, "t", inbox)
        assert inbox.all()[-1]["error_code"] == code


def test_an_engine_error_is_an_error_message(house: House) -> None:
    house.ready()
    house.engines[0].faults.submit_error = "kaboom"
    (error,) = house.ask(text="hi", req_id="a")
    assert error["error_code"] == 500
    house.engines[0].faults.submit_error = None
    check_stream(house.ask(text="hi", req_id="a", max_dec_len=2))


def test_an_openai_request_may_end_with_its_first_token_and_a_native_one_may_not(house: House) -> None:
    house.ready()
    house.ask(text="hi", req_id="a", max_dec_len=4)
    house.ask(text="hi", req_id="b", max_dec_len=4, dialect="openai")
    house.ask(text="hi", req_id="c", max_dec_len=4, dialect="openai", min_dec_len=1)
    assert [one.params.min_tokens for one in house.engines[0].submitted] == [1, 0, 1]
