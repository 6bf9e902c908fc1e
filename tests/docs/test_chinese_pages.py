"""The Chinese pages: the same code as the English ones, links that lead somewhere, and Chinese words."""

from __future__ import annotations

import re

import pytest

from server.conftest import REPOSITORY
from server.documents import CHINESE, blocks

HAN = re.compile(r"[一-鿿]")
PAGES = [*CHINESE.values(), "docs/zh/environment.md"]


@pytest.mark.parametrize(("english", "chinese"), CHINESE.items())
def test_the_code_is_the_same(english: str, chinese: str) -> None:
    there = [(one.language, one.code, one.error, one.norun is None) for one in blocks(english)]
    here = [(one.language, one.code, one.error, one.norun is None) for one in blocks(chinese)]
    assert here == there


@pytest.mark.parametrize(("english", "chinese"), CHINESE.items())
def test_the_sections_and_tables_are_the_same_in_number(english: str, chinese: str) -> None:
    def parts(page: str) -> tuple[int, int]:
        lines = re.sub(r"```.*?```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
        return sum(line.startswith("#") for line in lines), sum(line.startswith("| ") for line in lines)

    assert parts(chinese) == parts(english)


@pytest.mark.parametrize("page", PAGES)
def test_every_paragraph_is_chinese(page: str) -> None:
    text = re.sub(r"```.*?```", "", (REPOSITORY / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    paragraphs = [one.strip() for one in text.split("\n\n")]
    prose = [one for one in paragraphs if len(one) > 60 and not one.startswith(("|", "<!--", "!", "["))]
    assert [one for one in prose if not HAN.search(one)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", (REPOSITORY / page).read_text(encoding="utf-8"))
    folder = (REPOSITORY / page).parent
    assert targets
    assert [target for target in targets if not (folder / target).exists()] == []
