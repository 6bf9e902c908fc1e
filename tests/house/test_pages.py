"""The pages say what the code says: generated tables, links, commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "CONTRIBUTING.md"]


def test_the_generated_tables_are_up_to_date() -> None:
    command = [sys.executable, "docs/tables.py", "--check"]
    environ = {"PYTHONPATH": f"{REPOSITORY}/serving:{REPOSITORY}/client"}
    result = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, env=environ, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing
