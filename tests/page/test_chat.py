"""The page in a real browser: chat, stop, settings, state, keys, languages, themes, and text that stays text."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from gateway.conftest import Stack, until
from page.browser import Browser, PageError

LAST = "document.querySelector('.assistant:last-child')"
DONE = f"{LAST} && !{LAST}.hasAttribute('aria-busy')"
READY = "document.querySelector('#state').dataset.state === 'ready' && document.querySelector('#model').textContent"


@pytest.fixture
def page(browser: Browser, stack: Stack) -> Browser:
    """The page, ready, as a new visitor finds it."""
    browser.open(stack.url)
    browser.js("localStorage.clear(), sessionStorage.clear()")
    browser.open(f"{stack.url}/?fresh")
    browser.until(READY)
    return browser


def ask(page: Browser, text: str) -> None:
    page.js("document.querySelector('#prompt').focus()")
    page.type(text)
    page.press("Enter")


def set_field(page: Browser, name: str, value: str) -> None:
    page.js(f"document.querySelector('#{name}').value = {json.dumps(value)}")


def test_an_answer_streams_and_its_figures_are_shown(page: Browser, stack: Stack) -> None:
    stack.fake.delay = 0.05
    ask(page, "hello")
    page.until("document.querySelector('.assistant .content').textContent.startsWith('Hello')")
    assert page.js(f"{LAST}.hasAttribute('aria-busy')")
    page.until(DONE)
    assert page.text(".assistant .content") == "Hello, world 世界!"
    figures = page.text(".assistant .meta")
    assert figures.startswith("6 tokens · ")
    assert "tok/s" in figures
    assert "first after" in figures
    assert page.text("#announcement") == "The answer is complete."


def test_a_conversation_is_sent_whole(page: Browser, stack: Stack) -> None:
    ask(page, "one")
    page.until(DONE)
    ask(page, "two")
    page.until(f"document.querySelectorAll('.turn').length === 4 && {DONE}")
    roles = [(one["role"], one["content"]) for one in stack.fake.requests[-1]["messages"]]
    assert roles == [("user", "one"), ("assistant", "Hello, world 世界!"), ("user", "two")]
    page.click("#clear")
    assert page.js("document.querySelectorAll('.turn').length") == 0
    ask(page, "three")
    page.until(DONE)
    assert len(stack.fake.requests[-1]["messages"]) == 1


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_the_request_at_the_server_too(page: Browser, stack: Stack, how: str) -> None:
    stack.fake.words = [f"word{at} " for at in range(500)]
    stack.fake.delay = 0.02
    ask(page, "go on for ever")
    page.until(f"{LAST} && {LAST}.querySelector('.content').textContent.includes('word2')")
    if how == "button":
        page.click("#stop")
    else:
        page.press("Escape")
    page.until(DONE)
    until(lambda: stack.fake.aborts or stack.fake.cancelled)
    assert "stopped" in page.text(".assistant .meta")
    assert "word499" not in page.text(".assistant .content")
    assert page.js("!document.querySelector('#send').hidden && document.querySelector('#stop').hidden")


def test_settings_reach_the_model_and_empty_ones_are_left_out(page: Browser, stack: Stack) -> None:
    page.click("#settings-button")
    for name, value in {"temperature": "0.3", "top_k": "7", "max_tokens": "3", "seed": "18446744073709551615"}.items():
        set_field(page, name, value)
    set_field(page, "system", "Be brief.")
    ask(page, "hello")
    page.until(DONE)
    sent = stack.fake.requests[-1]
    assert (sent["temperature"], sent["top_k"], sent["max_dec_len"]) == (0.3, 7, 3)
    assert sent["infer_seed" if "infer_seed" in sent else "seed"] == 2**64 - 1
    assert "topp" not in sent
    assert "top_p" not in sent
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "cut at the limit" in page.text(".assistant .meta")


def test_a_wrong_setting_is_pointed_at_and_nothing_is_sent(page: Browser, stack: Stack) -> None:
    set_field(page, "temperature", "9")
    ask(page, "hello")
    page.until("document.activeElement.id === 'temperature'")
    assert page.text("#announcement") == "Check the marked field in the settings."
    assert stack.fake.requests == []


EVIL = [
    '<img src=x onerror="window.evil=1">',
    "<script>window.evil=1</script>",
    "`<svg onload=window.evil=1>` **<b onclick=window.evil=1>x</b>**",
    '```html\n<iframe srcdoc="<script>parent.evil=1</script>"></iframe>\n```\n',
    "[x](javascript:window.evil=1)",
    '</div></li><a href="javascript:window.evil=1">x</a>',
]


@pytest.mark.parametrize("text", EVIL)
def test_what_a_model_says_is_never_markup(page: Browser, stack: Stack, text: str) -> None:
    stack.fake.words = [text[:3], text[3:10], text[10:]]
    ask(page, text)
    page.until(DONE)
    page.js("new Promise((done) => setTimeout(done, 50))")
    allowed = "DIV PRE CODE STRONG BUTTON"
    inside = page.js("[...document.querySelectorAll('.content *')].map((one) => one.tagName)")
    assert set(inside) <= set(allowed.split())
    assert page.js("window.evil") is None
    assert page.js("document.querySelector('.user .content').textContent") == text
    shown = page.js("document.querySelector('.assistant .content').textContent")
    assert shown.count("evil") == text.count("evil")


BREACHES = [
    "document.body.innerHTML = '<img src=x onerror=window.evil=1>'",
    "document.body.setAttribute('onclick', 'window.evil=1')",
    "document.body.append(Object.assign(document.createElement('script'), {text: 'window.evil=1'}))",
]


@pytest.mark.parametrize("breach", BREACHES)
def test_even_the_pages_own_code_cannot_make_a_script_of_text(page: Browser, breach: str) -> None:
    with pytest.raises(PageError, match="Trusted"):
        page.js(breach)
    page.js("document.body.click()")
    assert page.js("window.evil") is None


def test_code_blocks_are_code_and_can_be_copied(page: Browser, stack: Stack) -> None:
    stack.fake.words = ["Use `x`:\n```py", "thon\nprint(1)\n", "```\nand **that** is it"]
    ask(page, "code")
    page.until(DONE)
    assert page.js("document.querySelector('.code pre').textContent") == "print(1)"
    assert page.js("document.querySelector('.prose code').textContent") == "x"
    assert page.js("document.querySelector('.prose strong').textContent") == "that"


def test_an_error_before_the_answer_is_shown_and_the_turn_can_be_repeated(page: Browser, stack: Stack) -> None:
    stack.fake.error = {"error_msg": "the queue is full", "error_code": 429}
    ask(page, "hello")
    page.until("document.querySelector('[role=alert]') !== null")
    assert "the queue is full" in page.text("[role=alert]")
    stack.fake.error = None
    page.press("Enter")  # the text is back in its field
    page.until(f"{DONE} && document.querySelectorAll('.turn').length === 4")
    assert [one["content"] for one in stack.fake.requests[-1]["messages"]] == ["hello"]


def test_an_error_in_the_middle_keeps_what_has_come(page: Browser, stack: Stack) -> None:
    stack.fake.error, stack.fake.error_at = {"error_msg": "out of time", "error_code": 408}, 2
    ask(page, "hello")
    page.until(DONE)
    assert page.text(".assistant .content") == "Hello,"
    assert "out of time" in page.text("[role=alert]")


def test_loading_is_shown_until_the_server_is_ready(browser: Browser, stack: Stack) -> None:
    stack.fake.state, stack.fake.info = "loading", {"progress": {"stage": "weights", "fraction": 0.4}}
    browser.open(stack.url)
    browser.until("document.querySelector('#loading-bar').value === 0.4")
    assert browser.text("#loading-text") == "The server is starting: loading weights 40%"
    assert browser.js("document.querySelector('#send').disabled")
    stack.fake.state = "ready"
    browser.until(READY)
    assert browser.js("document.querySelector('#loading').hidden && !document.querySelector('#send').disabled")


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(browser: Browser, make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(API_KEYS="secret")
    browser.open(stack.url)
    browser.until("!document.querySelector('#settings').hidden && !document.querySelector('#key-field').hidden")
    assert browser.js("document.querySelector('#docs').getAttribute('href')") == "/static/api.html"
    browser.js("document.querySelector('#key').focus()")
    browser.type("secret")
    browser.press("Tab")
    browser.until("document.querySelector('#model').textContent === 'tiny'")
    ask(browser, "hello")
    browser.until(DONE)
    assert browser.text(".assistant .content") == "Hello, world 世界!"
    assert browser.js("localStorage.getItem('octavo.key')") is None
    browser.open(f"{stack.url}/static/api.html")
    browser.until("document.querySelectorAll('.opblock').length > 5")


def test_no_key_field_where_no_key_is_needed(page: Browser) -> None:
    assert page.js("document.querySelector('#key-field').hidden")


def test_both_languages_are_whole_and_the_choice_is_kept(page: Browser, stack: Stack) -> None:
    assert page.js("document.documentElement.lang") == "en"
    page.click("#language")
    assert page.js("document.documentElement.lang") == "zh-CN"
    assert page.text("#send") == "发送"
    assert page.text("#state-text") == "就绪"
    page.open(f"{stack.url}/?again")
    page.until("document.querySelector('#send').innerText === '发送'")
    script = "import('/static/words.js').then((module) => { const all = []; for (const language of ['en', 'zh']) {"
    script += " module.setLanguage(language); all.push(Object.keys(module.words()).sort().join()); } return all; })"
    english, chinese = page.js(script)
    assert english == chinese
    used = page.js(
        "[...document.querySelectorAll('[data-text],[data-label],[data-placeholder]')]"
        ".flatMap((one) => [one.dataset.text, one.dataset.label, one.dataset.placeholder]).filter(Boolean)"
    )
    assert set(used) <= set(english.split(","))


def test_the_theme_follows_the_system_until_one_is_chosen(page: Browser, stack: Stack) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    page.prefer("light")
    light = page.js(paper)
    page.prefer("dark")
    dark = page.js(paper)
    assert light != dark
    page.click("#theme")
    assert page.js(paper) == light
    page.open(f"{stack.url}/?again")
    assert page.js(paper) == light


def test_a_screen_reader_gets_names_for_everything(page: Browser) -> None:
    page.click("#settings-button")
    nodes = page.accessible()
    interactive = [node for node in nodes if node[0] in ("button", "textbox", "spinbutton", "link")]
    assert len(interactive) > 10
    assert all(name for _, name in interactive)
    for role, name in (("textbox", "Message"), ("button", "Send"), ("list", "Conversation"), ("spinbutton", "Top p")):
        assert (role, name) in nodes


def test_the_keyboard_reaches_everything_in_order(page: Browser) -> None:
    page.js("document.activeElement.blur()")
    seen = []
    for _ in range(12):
        page.press("Tab")
        seen.append(page.js("document.activeElement.id || document.activeElement.className"))
    order = [seen.index(name) for name in ("skip", "brand", "docs", "language", "theme", "settings-button", "prompt")]
    assert order == sorted(order)


def test_shift_enter_starts_a_line(page: Browser, stack: Stack) -> None:
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    page.press("Enter")
    page.until(DONE)
    assert stack.fake.requests[-1]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("width", [360, 800, 1600])
def test_nothing_is_wider_than_the_window(page: Browser, stack: Stack, width: int) -> None:
    stack.fake.words = ["x" * 400, "\n```\n", "y" * 400, "\n```"]
    page.resize(width, 700)
    page.click("#settings-button")
    ask(page, "wide")
    page.until(DONE)
    assert page.js("document.scrollingElement.scrollWidth <= innerWidth")


def test_the_page_asks_nobody_but_its_own_server_and_complains_of_nothing(page: Browser, stack: Stack) -> None:
    ask(page, "hello")
    page.until(DONE)
    assert len(page.requests) > 5
    assert all(url.startswith((stack.url, "data:", "about:")) for url in page.requests)
    assert page.console == []


def test_swagger_ui_runs_offline(browser: Browser, stack: Stack) -> None:
    browser.open(f"{stack.url}/docs")
    browser.until("document.querySelectorAll('.opblock').length > 5")
    assert all(url.startswith((stack.url, "data:", "about:")) for url in browser.requests)
    assert browser.console == []
