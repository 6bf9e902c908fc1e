"""Pictures of the page for the documentation, of a running server: `cd tests && python -m page.screenshot URL`."""

from __future__ import annotations

import sys
from pathlib import Path

from page.browser import Browser, browsing, chromium

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images"
QUESTIONS = ("Hello, who are you?", "List 3 countries and their capitals.", "浙江的省会在哪里?")


def conversation(browser: Browser, url: str, *, language: str, scheme: str) -> None:
    """Open the page as a visitor with this language and theme would, and talk."""
    browser.open(url)
    browser.js(f"localStorage.clear(), localStorage.setItem('octavo.language', '{language}')")
    browser.prefer(scheme)
    browser.open(f"{url}/?{language}")
    browser.until("!document.querySelector('#send').disabled && document.querySelector('#model').textContent !== ''")
    browser.click("#settings-button")
    browser.js("document.querySelector('#temperature').value = '0'")
    for number, question in enumerate(QUESTIONS, start=1):
        browser.type(question)
        browser.press("Enter")
        browser.until(
            f"document.querySelectorAll('.assistant').length === {number} && !document.querySelector('[aria-busy]')"
        )


def main(arguments: list[str]) -> int:
    program = chromium()
    if len(arguments) != 1 or program is None:
        print("a URL and a Chromium are needed", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    with browsing(program) as make:
        browser = make()
        browser.resize(1240, 800, scale=1.5)
        for name, language, scheme in (("page", "en", "light"), ("page-dark", "zh", "dark")):
            conversation(browser, arguments[0], language=language, scheme=scheme)
            browser.screenshot(FOLDER / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
