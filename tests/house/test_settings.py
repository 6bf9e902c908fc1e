"""Every environment variable: defaults, aliases, what is refused and how, misspelled names, the table for people."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.cli import env
from octavo.cli.main import COMMANDS, main
from octavo.settings import (
    DEMO_MODEL,
    VARIABLES,
    Settings,
    SettingsError,
    Variable,
    child_environ,
    known_names,
    misspelled,
)

DOCUMENTED_DEFAULTS = {
    "MP_NUM": "1", "HTTP_PORT": "8110", "GRPC_PORT": "8811", "METRICS_PORT": "8722", "INFER_QUEUE_PORT": "8813",
    "PUSH_MODE_HTTP_PORT": "9965", "PUSH_MODE_HTTP_WORKERS": "1", "HOST": "0.0.0.0", "DISABLE_STREAMING": "0",
    "MAX_SEQ_LEN": "8192", "MAX_DEC_LEN": "1024", "BATCH_SIZE": "50", "BLOCK_RATIO": "0.75", "BLOCK_SIZE": "64",
    "MAX_CACHED_TASK_NUM": "128", "USE_WARMUP": "0", "USE_CACHE_KV_INT8": "1", "WEIGHT_QUANT": "auto",
    "HEAD_QUANT": "none", "DTYPE": "auto",
    "STRICT_MODEL": "0", "MAX_BODY_BYTES": str(4 << 20), "LOG_LEVEL": "INFO", "BLOCK_BS": None, "API_KEYS": None,
}  # fmt: skip
ALIASES = {
    "HEALTH_HTTP_PORT": "HTTP_PORT", "SERVICE_GRPC_PORT": "GRPC_PORT", "METRICS_HTTP_PORT": "METRICS_PORT",
    "INTER_PROC_PORT": "INFER_QUEUE_PORT", "SERVICE_HTTP_PORT": "PUSH_MODE_HTTP_PORT",
}  # fmt: skip
GOOD_AND_BAD = {
    "HTTP_PORT": ("9001", "70000"), "MP_NUM": ("2", "0"), "PUSH_MODE_HTTP_PORT": ("-1", "-2"),
    "PUSH_MODE_HTTP_WORKERS": ("8", "9"), "MAX_SEQ_LEN": ("1", "1.5"), "BATCH_SIZE": ("128", "129"),
    "BLOCK_BS": ("5", "0"), "BLOCK_RATIO": ("1", "nan"), "BLOCK_SIZE": ("64", "32"), "MAX_CACHED_TASK_NUM": ("0", "-1"),
    "USE_WARMUP": ("1", "yes"), "WEIGHT_QUANT": ("A8W8", "int4"), "HEAD_QUANT": ("wint8", "auto"),
    "DTYPE": ("float32", "float64"),
    "API_KEYS": ("a, b", "a,,b"), "MAX_BODY_BYTES": ("1024", "10"), "LOG_LEVEL": ("debug", "LOUD"),
    "DRAIN_SECONDS": ("0", "-1"), "DEVICE": ("cpu", "tpu"), "SERVED_MODEL_NAME": ("m", "a\nb"),
}  # fmt: skip


def variable(name: str) -> Variable:
    return next(entry for entry in VARIABLES if entry.name == name)


@pytest.mark.parametrize(("name", "default"), DOCUMENTED_DEFAULTS.items())
def test_default_is_the_documented_one(name: str, default: str | None) -> None:
    assert variable(name).default == default


def test_nothing_set_gives_settings_that_start() -> None:
    settings = Settings.from_environ({})
    assert settings.batch_size == 50
    assert settings.model_dir in (str(DEMO_MODEL), "/models")
    assert settings.run_dir.name == "8110"
    assert settings.log_dir == settings.run_dir / "log"


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_alias_sets_the_same_field_and_must_not_contradict(alias: str, name: str) -> None:
    field = variable(name).field
    assert getattr(Settings.from_environ({alias: "12345"}), field) == 12345
    assert getattr(Settings.from_environ({alias: "12345", name: "12345"}), field) == 12345
    with pytest.raises(SettingsError, match=re.escape(f"{alias}=12345: contradicts {name}=12346")):
        Settings.from_environ({alias: "12345", name: "12346"})


@pytest.mark.parametrize(("name", "good", "bad"), [(name, *values) for name, values in GOOD_AND_BAD.items()])
def test_bad_value_is_refused_in_one_line_with_what_is_allowed(name: str, good: str, bad: str) -> None:
    Settings.from_environ({name: good})
    with pytest.raises(SettingsError) as caught:
        Settings.from_environ({name: bad})
    assert str(caught.value) == f"{name}={bad}: {variable(name).allowed}"


def test_empty_value_counts_as_unset() -> None:
    assert Settings.from_environ({"HTTP_PORT": "", "API_KEYS": ""}) == Settings.from_environ({})


def test_equal_ports_are_refused() -> None:
    with pytest.raises(SettingsError, match="METRICS_PORT=9000: is also HTTP_PORT"):
        Settings.from_environ({"HTTP_PORT": "9000", "METRICS_PORT": "9000"})


def test_settings_are_frozen_and_every_field_has_a_variable() -> None:
    settings = Settings.from_environ({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.batch_size = 1  # type: ignore[misc]
    assert {entry.field for entry in VARIABLES} == {field.name for field in dataclasses.fields(Settings)}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("MAX_SEQ_LN", "MAX_SEQ_LEN"),
        ("BTACH_SIZE", "BATCH_SIZE"),
        ("HTTP_PORTS", "HTTP_PORT"),
        ("MODEL_DIB", "MODEL_DIR"),
    ],
)
def test_name_one_letter_off_is_pointed_out(given: str, meant: str) -> None:
    assert (given, meant) in misspelled({given: "1"})


def test_known_and_foreign_names_are_left_alone() -> None:
    assert misspelled({name: "1" for name in known_names()} | {"PATH": "/bin", "HOME": "/", "LANG": "C"}) == []


def test_child_reads_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in known_names():
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BATCH_SIZE", "7")
    settings = Settings.from_environ()
    child = Settings.from_environ(child_environ(settings))
    assert child == dataclasses.replace(settings, managed_by_node=True)


def test_env_table_has_a_row_for_every_variable() -> None:
    rows = env.markdown_table().splitlines()[2:]
    shown = [entry for entry in VARIABLES if not entry.internal]
    assert len(rows) == len(shown)
    for row, entry in zip(rows, shown):
        assert row.startswith(f"| `{entry.name}`")
        assert row.count("|") == 5
        assert entry.doc in row
    assert "OCTAVO_NODE" not in env.terminal_table()


def test_env_check_names_the_bad_value(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_SIZE", "1000")
    assert main(["env", "--check"]) == 2
    assert capsys.readouterr().err == "octavo: error: BATCH_SIZE=1000: must be a whole number from 1 to 128\n"


def test_command_without_arguments_lists_what_there_is() -> None:
    serving = str(Path(__file__).parents[2] / "serving")
    environ = {**os.environ, "PYTHONPATH": serving}
    done = subprocess.run([sys.executable, "-m", "octavo.cli.main", "-h"], capture_output=True, text=True, env=environ)
    assert done.returncode == 0
    assert all(f"  {name}" in done.stdout for name in COMMANDS)


def test_command_that_this_version_lacks_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "absent", "")
    assert main(["absent"]) == 2
    assert capsys.readouterr().err == "octavo: error: `octavo absent` is not available in this version\n"
