"""Chat templates that a hostile model folder could bring, and users who write what a template writes."""

from __future__ import annotations

import time

import pytest

from octavo.protocol.errors import InvalidRequest
from octavo.text.chat_template import ChatTemplate

USER = [{"role": "user", "content": "x"}]
LOOP = "{% set ns = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}{{ ns.x }}"


def doubling(step: str, start: str = "'x'") -> str:
    return LOOP.replace("START", start).replace("STEP", step)


BOMBS = {
    "concatenation": doubling("{% set ns.x = ns.x ~ ns.x %}"),
    "addition": doubling("{% set ns.x = ns.x + ns.x %}"),
    "block": doubling("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
    "lists": doubling("{% set ns.x = ns.x + ns.x %}", "[1]"),
    "lists of lists": doubling("{% set ns.x = [ns.x, ns.x] %}", "[1]"),
    "lists of lists as JSON": doubling("{% set ns.x = [ns.x, ns.x] %}", "[1]").replace(
        "{{ ns.x }}", "{{ ns.x|tojson }}"
    ),
    "squares": doubling("{% set ns.x = ns.x * ns.x %}", "9"),
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "ljust": "{{ 'x'.ljust(3000000000) }}",
    "zfill": "{{ 'x'.zfill(3000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(3000000000) }}",
    "replace method": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "join method": "{{ ('b' * 99999).join(['x'] * 99999) }}",
    "join filter": "{{ range(99999) | list | join('b' * 99999) }}",
    "indent": "{{ ('a\n' * 99999) | indent(99999) }}",
    "format method": "{{ '{:3000000000}'.format(1) }}",
    "format filter": "{{ '%3000000000d' | format(1) }}",
    "indented JSON": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "lorem ipsum": "{{ lipsum(n=1000000) }}",
}
ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['jinja2'] }}",
    "init": "{{ namespace.__init__.__globals__ }}",
    "attr filter": "{{ ('' | attr('__class__')).mro() }}",
    "map filter": "{{ (['']|map(attribute='__class__')|list)[0].mro() }}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format_map": "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "change of input": "{{ messages.append(1) }}",
    "change of a message": "{{ messages[0].update({'role': 'system'}) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_no_template_fills_the_memory_or_runs_for_ever(name: str) -> None:
    template, began = ChatTemplate(BOMBS[name], {}), time.monotonic()
    with pytest.raises(InvalidRequest) as refused:
        template.render(USER)
    assert refused.value.field == "messages"
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("name", ESCAPES)
def test_no_template_reaches_python(name: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(ESCAPES[name], {}).render(USER)


@pytest.mark.parametrize("name", ["center", "pprint", "urlize", "wordwrap", "xmlattr"])
def test_filters_that_no_prompt_needs_are_not_there(name: str) -> None:
    with pytest.raises(ValueError, match="does not compile"):
        ChatTemplate("{{ 'x' | " + name + " }}", {})


def test_what_users_write_is_never_a_template() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ who }}", {})
    text = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{# no #}${x}"
    assert template.render([{"role": "user", "content": text}], variables={"who": text}) == f"<user>{text}{text}"


def test_users_variables_cannot_replace_the_conversation() -> None:
    template = ChatTemplate(
        "{{ messages[0].content }}{{ bos_token }}{{ raise_exception is defined }}", {"bos_token": "B"}
    )
    variables = {"messages": "mine", "bos_token": "mine", "add_generation_prompt": "mine"}
    assert template.render(USER, variables=variables) == "xBTrue"


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": ("user", "assistant")[number % 2], "content": "word " * 200} for number in range(2000)]
    source = "{% for m in messages %}{{ '[' ~ m.role ~ '] ' + m.content.strip() ~ '\n' }}{% endfor %}"
    assert len(ChatTemplate(source, {}).render(messages)) > 2_000_000
