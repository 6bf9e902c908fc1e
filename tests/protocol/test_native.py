"""The table of native fields: what is taken, what is refused, and in which words."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.protocol.errors import InvalidRequest
from octavo.protocol.native import (
    FIELDS,
    Message,
    Request,
    decode_body,
    markdown_table,
    parse_request,
    request_schema,
)


def parse(**body: object) -> Request:
    return parse_request({"text": "hi", **body})


@pytest.mark.parametrize(("body", "message"), [
    ({"topp": 1.5}, "topp (1.5) must be in [0, 1]"),
    ({"topp": "0.5"}, "topp must be a number, not a string"),
    ({"topp": True}, "topp must be a number, not a boolean"),
    ({"topp": math.nan}, "topp (nan) must be in [0, 1]"),
    ({"temperature": math.inf}, "temperature (inf) must be in [0, 100]"),
    ({"temperature": 10**400}, None),
    ({"temperature": -1}, "temperature (-1) must be in [0, 100]"),
    ({"penalty_score": 0}, "penalty_score (0) must be in (0, 2]"),
    ({"presence_score": -3}, "presence_score (-3) must be in [-2, 2]"),
    ({"max_dec_len": 0}, "max_dec_len (0) must be in [1, 16777216]"),
    ({"max_dec_len": 5.0}, "max_dec_len (5.0) must be a whole number"),
    ({"max_dec_len": True}, "max_dec_len must be a whole number, not a boolean"),
    ({"max_dec_len": [1]}, "max_dec_len must be a whole number, not a list"),
    ({"max_dec_len": 5, "max_tokens": 5}, "max_dec_len and max_tokens name the same field; give one of them"),
    ({"topp": 0.5, "top_p": 0.5}, "topp and top_p name the same field; give one of them"),
    ({"max_tokens": 0}, "max_tokens (0) must be in [1, 16777216]"),
    ({"stream": 1}, "stream must be true or false, not a number"),
    ({"stop": ["a"] * 17}, "stop has 17 entries; at most 16 are allowed"),
    ({"stop": ""}, "stop has 0 characters and must be 1 to 256 characters long"),
    ({"stop": ["a", "b" * 257]}, "stop[1] has 257 characters and must be 1 to 256 characters long"),
    ({"stop": {"a": 1}}, "stop must be a string, not an object"),
    ({"n": 129}, "n (129) must be in [1, 128]"),
    ({"req_id": 5}, "req_id must be a string, not a number"),
    ({"req_id": ""}, "req_id has 0 characters and must be 1 to 256 characters long"),
    ({"response_type": "x"}, "response_type ('x') must be fastdeploy or openai"),
    ({"logit_bias": {"x": 1}}, "logit_bias ('x') must be an object whose keys are token ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias[1] (101) must be in [-100, 100]"),
    ({"logit_bias": {str(k): 0 for k in range(1025)}}, "logit_bias has 1025 entries; at most 1024 are allowed"),
    (
        {"infer_seed": 1 << 64},
        "infer_seed (18446744073709551616) must be in [-9223372036854775808, 18446744073709551615]",
    ),
    ({"eos_token_ids": "x"}, "eos_token_ids must be a whole number, not a string"),
    ({"generated_token_ids": [1, -1]}, "generated_token_ids[1] (-1) must be in [0, 2147483647]"),
    ({"generated_token_ids": [1, True]}, "generated_token_ids[1] must be a whole number, not a boolean"),
    ({"generated_token_ids": [1], "n": 2}, "generated_token_ids needs one list for each of n=2 choices"),
    ({"chat_template_kwargs": {"a": [1]}}, "chat_template_kwargs[a] must be a string, number or boolean, not a list"),
    ({"text": None}, "one of text, messages, input_ids is needed"),
    ({"input_ids": [1]}, "text and input_ids were both given; give one of them"),
    ({"timeout": 0}, "timeout (0) must be in (0, 86400]"),
])
def test_refusals(body: dict, message: str | None) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(**body)
    assert message is None or refusal.value.message == message
    assert len(refusal.value.message) < 500


@pytest.mark.parametrize(("messages", "message"), [
    ("x", "messages must be a list, not a string"),
    ([], "messages must have at least 1 entries, not 0"),
    ([{"role": "user", "content": "x"}] * 4097, "messages has 4097 entries; at most 4096 are allowed"),
    ([5], "messages[0] must be an object with role and content, not a number"),
    ([{"content": "x"}], "messages[0].role must be a string, not null"),
    ([{"role": "bot", "content": "x"}], "messages[0].role ('bot') must be one of system, user, assistant, developer"),
    ([{"role": "tool", "content": "x"}], "messages[0]: tool calls are not served"),
    ([{"role": "assistant", "content": "", "tool_calls": [1]}], "messages[0]: tool calls are not served"),
    ([{"role": "user"}], "messages[0].content must be a string or a list of text parts, not null"),
    ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "messages[0].content[0]: parts of type 'image_url' are not served, only text"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text must be a string, not null"),
])
def test_refused_messages(messages: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse_request({"messages": messages})
    assert refusal.value.message == message
    assert refusal.value.field == "messages"


def test_messages_are_joined_and_developers_count_as_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_request({"messages": [{"role": "developer", "content": "d", "name": "x"},
                                          {"role": "user", "content": parts}]})
    assert request.messages == (Message("system", "d"), Message("user", "ab"))


def test_aliases_nulls_and_unknown_fields() -> None:
    request = parse(seq_len=7, top_p=0, seed=-1, stop="x", eos_token_ids=3, topp=None, max_dec_len=None, model_id="y")
    assert (request.max_dec_len, request.topp, request.infer_seed) == (7, 0.0, -1)
    assert (request.stop, request.eos_token_ids) == (("x",), (3,))
    assert parse(top_k=-1).top_k == 0
    assert parse(generated_token_ids=[[1], []], n=2, send_idx=[1, 0]).generated_token_ids == ([1], [])
    assert parse(logit_bias={"7": 1}).logit_bias == {7: 1.0}


def test_every_field_of_the_table_is_one_of_the_request() -> None:
    assert {field.name for field in FIELDS} == set(Request.__struct_fields__)
    names = [name for field in FIELDS for name in (field.name, *field.aliases)]
    assert len(names) == len(set(names))


def test_schema_and_documentation_come_from_the_table() -> None:
    schema = request_schema()
    json.dumps(schema)
    assert schema["properties"]["topp"]["maximum"] == 1
    assert schema["properties"]["max_tokens"]["description"].startswith("Alias of max_dec_len")
    assert "generated_token_ids" not in schema["properties"]
    assert "generated_token_ids" in request_schema(internal=True)["properties"]
    table = markdown_table()
    assert "| `topp`, `top_p` | float | in [0, 1] | 0.7 |" in table
    assert all(line.count("|") == 6 for line in table.splitlines())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)


@given(body=st.dictionaries(st.sampled_from([n for f in FIELDS for n in (f.name, *f.aliases)]), JSON, max_size=4))
def test_nothing_but_a_request_or_a_refusal_comes_out(body: dict) -> None:
    with contextlib.suppress(InvalidRequest):
        assert isinstance(parse_request(body), Request)


@pytest.mark.parametrize(("body", "value"), [
    (b'[{"a": 1}]', {"a": 1}), (b'{"a": 1}', {"a": 1}), ('{"a": "\u00e9"}', {"a": "é"}),
])
def test_in_is_a_list_of_one_or_a_bare_object(body: bytes, value: dict) -> None:
    assert decode_body(body) == value


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[1]", b"[{}, {}]", b"7", b'{"a": NaN}', b"\xff", b"[" * 100_000,
                                  b'{"a": 1e999}', b'{"a": "\\ud800"}'])
def test_other_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_body(body)
