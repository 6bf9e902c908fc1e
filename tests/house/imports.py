"""Who imports what, read from the source: no module is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = (REPOSITORY / "serving", REPOSITORY / "client")


@dataclass(frozen=True)
class Import:
    """One imported module, as `importer` names it."""

    importer: str  # "octavo.engine.core"
    target: str  # "octavo.scheduling.plan" or "torch.nn"
    line: int
    at_start: bool  # executed when the importer is imported


def modules() -> dict[str, Path]:
    """Every module of the distribution and its file."""
    found = {}
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path, source: str | None = None) -> list[Import]:
    """All imports of one module but those for type checkers."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return [
        Import(name, target, node.lineno, at_start)
        for node, at_start in _statements(tree, at_start=True)
        for target in _targets(node, package)
    ]


def _statements(node: ast.AST, *, at_start: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, at_start
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (found for part in child.orelse for found in _statements(part, at_start=at_start))
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _statements(child, at_start=at_start and not function)


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Modules that a statement names; `from a import b` gives a.b, which may be a module or a name in a."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = package.split(".")
        base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def closure(name: str, found: dict[str, list[Import]]) -> dict[str, str]:
    """Everything that importing a module executes or names: target -> the module that imports it."""
    reached: dict[str, str] = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for item in found.get(current, []):
            if item.at_start and item.target not in reached:
                reached[item.target] = current
                waiting += [part for part in _prefixes(item.target) if part in found and part != current]
    return reached


def _prefixes(target: str) -> list[str]:
    parts = target.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
