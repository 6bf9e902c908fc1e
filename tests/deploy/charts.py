"""Renders the Helm chart with Go's own template engine, and writes deploy/k8s from it.

    cd tests && python -m deploy.charts --write

The engine is the go-template package: text/template behind a C interface, without Helm's own functions, which the
chart's templates do not use. Each rendering runs in a process of its own (the library brings Go's runtime with it).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "deploy" / "helm" / "octavo"
MANIFESTS = REPOSITORY / "deploy" / "k8s"
EVERYTHING: dict[str, Any] = {"serviceMonitor": {"enabled": True}, "autoscaling": {"enabled": True}}
RENDER = "import sys, go_template; go_template.render_template(*sys.argv[1:4])"


def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The chart's values with some changed, maps merged as Helm merges them."""
    return merged(yaml.safe_load((CHART / "values.yaml").read_text()), changes or {})


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        out[name] = merged(base[name], value) if both else value
    return out


def render(changes: dict[str, Any] | None = None, *, release: str = "octavo") -> dict[str, str]:
    """Text of every template that makes something, by its file's name."""
    context = {"Values": values(changes), "Release": {"Name": release, "Namespace": "default"}}
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "values.yaml", Path(folder) / "out.yaml"
        given.write_text(yaml.safe_dump(context))
        texts = {}
        for template in sorted((CHART / "templates").glob("*.yaml")):
            out.unlink(missing_ok=True)
            command = [sys.executable, "-c", RENDER, str(template), str(given), str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
            texts[template.name] = out.read_text()
    return {name: text for name, text in texts.items() if text.strip()}


def main() -> int:
    MANIFESTS.mkdir(exist_ok=True)
    for name, text in render(EVERYTHING).items():
        (MANIFESTS / name).write_text(text.strip() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
