"""Puts the generated tables into the pages: the environment into README.md, the native fields into docs/api.md.

python docs/tables.py            rewrite the pages
python docs/tables.py --check    exit 1 if a page is not as it would be written
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from octavo.cli.env import markdown_table as environment_table
from octavo.protocol.native import markdown_table as fields_table

REPOSITORY = Path(__file__).resolve().parents[1]
TABLES = {
    REPOSITORY / "README.md": ("environment", environment_table),
    REPOSITORY / "docs" / "api.md": ("native-fields", fields_table),
}


def filled(page: Path) -> str:
    """The page with its table as it is now."""
    mark, make = TABLES[page]
    pattern = re.compile(f"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}{make().strip()}\n{found[2]}", page.read_text(encoding="utf-8"))


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
