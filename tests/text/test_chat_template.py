"""Chat templates: the same prompts as transformers makes, order repaired, limits held."""

from __future__ import annotations

import itertools
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from octavo.protocol.errors import InvalidRequest
from octavo.text.chat_template import ChatTemplate, in_order
from octavo.text.tokenizer import Tokenizer, TokenizerError
from text.vocabularies import CHATML, STRICT, byte_level, sentencepiece, write_folder

USER, SYSTEM, ASSISTANT = "user", "system", "assistant"
RICH = (
    "{%- if tools %}never{% endif -%}\n"
    "{{ bos_token }}{% set ns = namespace(count=0) %}\n"
    "{%- for message in messages if message.role != 'system' %}\n"
    "    {%- set ns.count = ns.count + 1 %}\n"
    "    {%- if loop.index > 3 %}{% break %}{% endif %}\n"
    "    {%- generation %}{{ loop.index }}/{{ loop.length }}:{{ message.content | trim | tojson }}{% endgeneration %}\n"
    "{%- endfor %}|{{ ns.count }}|{{ {'k': 'é<&>'} | tojson(indent=1) }}|{{ strftime_now('%Y') | length }}|{{ extra }}"
)


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"role": turn.split(":", 1)[0], "content": turn.split(":", 1)[1]} for turn in turns]


@pytest.mark.parametrize("template", [CHATML, STRICT, RICH, [{"name": "default", "template": CHATML},
                                                             {"name": "tool_use", "template": "no"}]])
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_prompts_equal_those_of_transformers(tmp_path: Path, template: object, make) -> None:
    bos = "<|bos|>" if make is byte_level else "<s>"
    config = {"bos_token": bos, "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}
    folder = write_folder(tmp_path, make(), chat_template=template, **config)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for messages in (chat("user: Hé 🙂 "), chat("system:be", "user:a", "assistant:b", "user:  c\n"),
                     chat("user:1", "assistant:2", "user:3", "assistant:4")):
        for add in (True, False):
            text = ours.chat_template.render(messages, add_generation_prompt=add, variables={"extra": 5})
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=add, extra=5)
            assert text == expected
            ids = theirs.apply_chat_template(messages, tokenize=True, add_generation_prompt=add, extra=5,
                                             return_dict=False)
            assert ours.encode(text) == ids


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_plain_texts_encode_and_decode_as_in_transformers(tmp_path: Path, make) -> None:
    folder = write_folder(tmp_path, make(), chat_template=None)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("Hello world", " a  b\n", "人工智能🙂", "", "<think>x<|im_end|>"):
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_order_of_messages_is_repaired_only_if_refused() -> None:
    strict, lax = ChatTemplate(STRICT, {}), ChatTemplate(CHATML, {})
    messages = chat("user:who", "system:helpful", "user:list", "system:short")
    assert strict.render(messages) == "<<helpful\n\nshort>>[user]who\n\nlist"
    assert lax.render(chat("user:a", "system:b"), add_generation_prompt=False) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n")
    with pytest.raises(InvalidRequest, match="refuses the messages: roles must alternate"):
        strict.render(chat("assistant:first", "user:then"))


def test_order() -> None:
    assert in_order(chat("user:a", "user:b", "assistant:c", "system:s", "assistant:d")) == chat(
        "system:s", "user:a\n\nb", "assistant:c\n\nd")


@pytest.mark.parametrize("source", [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{{ 'x' * 999999999999 }}",
    "{{ [0] * 999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10 ** 9) }}",
    "{{ ''.__class__.__mro__ }}{{ messages.__class__.__init__.__globals__['os'] }}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
])
def test_a_template_cannot_run_wild(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(InvalidRequest):
        template.render(chat("user:x"))


def test_a_template_is_stopped_by_the_clock() -> None:
    clock = itertools.count(step=2.0)
    source = "{% for a in [1] %}{% for b in [1] %}{% for c in [1] %}{% endfor %}{% endfor %}{% endfor %}"
    template = ChatTemplate(source, {}, clock=lambda: float(next(clock)))
    with pytest.raises(InvalidRequest, match="too many steps"):
        template.render(chat("user:x"))


def test_templates_that_do_not_compile_are_found_at_the_start(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), chat_template="{% for %}")
    with pytest.raises(TokenizerError, match="does not compile"):
        Tokenizer.load(folder)
    with pytest.raises(ValueError, match="at most"):
        ChatTemplate("x" * 2_000_000, {})


def test_the_date_is_the_given_one() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2026, 11, 21))
    assert template.render(chat("user:x")) == "21 Nov 2026"


def test_a_message_can_be_continued() -> None:
    template = ChatTemplate(CHATML, {})
    text = template.render(chat("user:a", "assistant:The answer"), continue_final_message=True)
    assert text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nThe answer"
    with pytest.raises(InvalidRequest, match="last message of the assistant"):
        template.render(chat("user:a"), continue_final_message=True)


def test_where_templates_and_end_tokens_are_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level(), chat_template="old", eos_token="<|im_end|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 7], "temperature": 0.6, "top_p": "x"}')
    assert Tokenizer.load(folder).chat_template.render(chat("user:x")) == "old"
    (folder / "chat_template.json").write_text('{"chat_template": "newer"}')
    assert Tokenizer.load(folder).chat_template.render(chat("user:x")) == "newer"
    (folder / "chat_template.jinja").write_text("newest")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.chat_template.render(chat("user:x")) == "newest"
    assert tokenizer.eos_ids == (0, 2, 7)
    assert tokenizer.defaults == {"temperature": 0.6}


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]"])
def test_a_spoilt_file_beside_the_tokenizer_is_named_in_one_line(tmp_path: Path, name: str, content: str) -> None:
    folder = write_folder(tmp_path, byte_level(), chat_template=CHATML)
    (folder / name).write_text(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        Tokenizer.load(folder)
    assert str(caught.value).isprintable()
