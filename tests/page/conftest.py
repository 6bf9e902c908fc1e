"""A gateway in front of a stand-in for Triton, and a real browser before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from gateway.conftest import Stack, make_stack, shared_stack, stack  # noqa: F401  fixtures
from page.browser import Browser, browsing, chromium


@pytest.fixture(scope="session")
def make_browser() -> Iterator[Callable[[], Browser]]:
    program = chromium()
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with browsing(program) as make:
        yield make


@pytest.fixture(scope="session")
def shared_browser(make_browser: Callable[[], Browser]) -> Browser:
    return make_browser()


@pytest.fixture
def browser(shared_browser: Browser) -> Browser:
    """One browser for all tests; what a test leaves in its storage is gone for the next one."""
    shared_browser.open("about:blank#start")
    shared_browser.call("Emulation.setEmulatedMedia", features=[])
    shared_browser.resize(1200, 800)
    shared_browser.console.clear()
    shared_browser.requests.clear()
    return shared_browser
