"""The shell blocks of the pages for operators run as written; those that do not run say why."""

from __future__ import annotations

import pytest

from server.conftest import Server, make_server
from server.documents import Block, blocks
from server.test_documents import test_a_shell_block_does_what_the_page_says as run_block

pytestmark = pytest.mark.server

PAGES = ("docs/deployment.md", "docs/observability.md")
SHELL = [block for page in PAGES for block in blocks(page) if block.language == "bash"]


def test_what_is_not_run_says_why() -> None:
    assert sum(block.norun is None for block in SHELL) >= 4
    assert all(block.norun is None or len(block.norun) > 10 for block in SHELL)


@pytest.mark.parametrize("block", [one for one in SHELL if one.norun is None], ids=lambda one: one.name)
def test_an_operators_block_runs(server: Server, tmp_path_factory: pytest.TempPathFactory, block: Block) -> None:
    environ = make_server(tmp_path_factory.mktemp("spare")).environ
    run_block(server, environ, block)
