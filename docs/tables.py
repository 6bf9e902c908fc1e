"""Puts the generated tables into the pages: the environment and the native fields, in English and in Chinese.

python docs/tables.py            rewrite the pages
python docs/tables.py --check    exit 1 if a page is not as it would be written

The Chinese words are in docs/zh/words.json; what is not there yet stays English.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from octavo.cli.env import markdown_table as environment_table
from octavo.protocol.native import markdown_table as fields_table

DOCS = Path(__file__).resolve().parent
REPOSITORY = DOCS.parent
ENVIRONMENT, FIELDS = ("environment", environment_table), ("native-fields", fields_table)
TABLES: dict[Path, tuple[str, Callable[[], str]]] = {
    DOCS / "environment.md": ENVIRONMENT,
    DOCS / "api.md": FIELDS,
    DOCS / "zh" / "environment.md": ENVIRONMENT,
    DOCS / "zh" / "api.md": FIELDS,
}


def filled(page: Path) -> str:
    """The page with its table as it is now."""
    mark, make = TABLES[page]
    table = make().strip()
    if page.parent.name == "zh":
        table = in_chinese(table, "environment" if mark == "environment" else "fields")
    pattern = re.compile(f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", page.read_text(encoding="utf-8"))


def in_chinese(table: str, kind: str) -> str:
    """The table with its heading, its set phrases and the meanings that are known in Chinese."""
    words = json.loads((DOCS / "zh" / "words.json").read_text(encoding="utf-8"))
    heading, rule, *rows = table.splitlines()
    translated = [_row(row, words[kind], words["phrases"]) for row in rows]
    return "\n".join([words["headers"].get(heading, heading), rule, *translated])


def _row(row: str, meanings: dict[str, str], phrases: list[list[str]]) -> str:
    cells = row.removeprefix("| ").removesuffix(" |").split(" | ")
    names = re.findall(r"`([^`]+)`", cells[0])
    middle = []
    for cell in cells[1:-1]:
        for pattern, replacement in phrases:
            cell = re.sub(pattern, replacement, cell)
        middle.append(cell)
    meaning = next((meanings[name] for name in names if name in meanings), cells[-1])
    return "| " + " | ".join([cells[0], *middle, meaning]) + " |"


def main(arguments: list[str]) -> int:
    stale = [page for page in TABLES if filled(page) != page.read_text(encoding="utf-8")]
    if "--check" in arguments:
        for page in stale:
            print(f"{page.relative_to(REPOSITORY)} is stale: python docs/tables.py")
        return 1 if stale else 0
    for page in stale:
        page.write_text(filled(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
