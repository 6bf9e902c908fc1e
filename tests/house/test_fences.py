"""The house's fences, held by walking the imports of every module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from house.imports import REPOSITORY, Import, closure, imports_of, modules

MODULES = modules()
IMPORTS = {name: imports_of(name, path) for name, path in MODULES.items()}
ALL = [item for items in IMPORTS.values() for item in items]

# room -> level; the longest prefix that fits counts. Imports go to the same room or downwards.
LEVELS = {
    "octavo": 0,  # the package itself and its lazy attribute
    "octavo.settings": 0,
    "octavo.protocol": 0,
    "octavo.scheduling": 1,
    "octavo.kernels": 1,
    "octavo.quantization": 1,
    "octavo.models": 2,
    "octavo.parallel": 2,
    "octavo.engine": 3,
    "octavo.text": 3,
    "octavo.quantization.calibrate": 4,
    "octavo.quantization.export": 4,
    "octavo.frontend": 4,
    "octavo.gateway": 5,
    "octavo.node": 5,
    "octavo.cli": 5,
}
ONLY_L0 = ("octavo.gateway", "octavo.node")
NO_TORCH = ("octavo.protocol", "octavo.scheduling", "octavo.text", "octavo.frontend", "octavo.gateway", "octavo_client")
WEB = ("fastapi", "starlette", "uvicorn")
NOWHERE = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "multiprocessing.managers", "transformers")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(name: str) -> str:
    return max((entry for entry in LEVELS if within(name, entry)), key=len)


def level_faults(items: list[Import]) -> list[str]:
    """Imports that go upwards, or sideways between rooms of the first level."""
    faults = []
    for item in items:
        if not (within(item.importer, "octavo") and within(item.target, "octavo")) or item.importer == "octavo":
            continue
        own, other = room(item.importer), room(item.target)
        sideways = own != other and LEVELS[own] == LEVELS[other] == 1
        if LEVELS[other] > LEVELS[own] or sideways:
            faults.append(f"{item.importer}:{item.line} imports {item.target}")
    return faults


def foreign(items: list[Import], package: str, *, allowed: tuple[str, ...]) -> list[str]:
    """Imports of a package by modules that are not allowed to."""
    return [
        f"{item.importer}:{item.line} imports {item.target}"
        for item in items
        if within(item.target, package) and not any(within(item.importer, room) for room in allowed)
    ]


def test_imports_go_downwards() -> None:
    assert level_faults(ALL) == []


@pytest.mark.parametrize(
    ("importer", "target", "is_fault"),
    [
        ("octavo.protocol.native", "octavo.engine.core", True),
        ("octavo.kernels.cpu", "octavo.quantization.scheme", True),
        ("octavo.models.loader", "octavo.quantization.formats", False),
        ("octavo.models.loader", "octavo.quantization.export", True),
        ("octavo.engine.core", "octavo.scheduling.plan", False),
        ("octavo.kernels.cpu.build", "octavo.kernels.interface", False),
    ],
)
def test_level_rule_finds_what_it_should(importer: str, target: str, is_fault: bool) -> None:
    assert bool(level_faults([Import(importer, target, 1, True)])) is is_fault


@pytest.mark.parametrize("outer", ONLY_L0)
def test_outer_rooms_know_the_protocol_alone(outer: str) -> None:
    faults = [
        f"{item.importer}:{item.line} imports {item.target}"
        for item in ALL
        if within(item.importer, outer)
        and within(item.target, "octavo")
        and not (within(item.target, outer) or LEVELS[room(item.target)] == 0)
    ]
    assert faults == []


def test_client_knows_the_protocol_alone() -> None:
    faults = [
        f"{item.importer}:{item.line} imports {item.target}"
        for item in ALL
        if within(item.importer, "octavo_client")
        and within(item.target, "octavo")
        and not within(item.target, "octavo.protocol")
        and item.target != "octavo.__version__"
    ]
    assert faults == []


@pytest.mark.parametrize("name", [name for name in MODULES if any(within(name, room) for room in NO_TORCH)])
def test_room_starts_without_torch(name: str) -> None:
    heavy = {target: via for target, via in closure(name, IMPORTS).items() if within(target, "torch")}
    assert heavy == {}


def test_torch_is_not_imported_late_either() -> None:
    late = [
        item for item in ALL if any(within(item.importer, room) for room in NO_TORCH) and within(item.target, "torch")
    ]
    assert late == []


def test_web_framework_stays_in_gateway_and_node() -> None:
    assert [
        fault for package in WEB for fault in foreign(ALL, package, allowed=("octavo.gateway", "octavo.node"))
    ] == []


def test_triton_lang_stays_in_its_kernels() -> None:
    assert foreign(ALL, "triton", allowed=("octavo.kernels.gpu",)) == []


def test_distributed_stays_in_parallel() -> None:
    users = ("octavo.parallel",)
    assert foreign(ALL, "torch.distributed", allowed=users) + foreign(ALL, "ray", allowed=users) == []


def test_triton_stub_module_is_imported_by_the_model_alone() -> None:
    assert foreign(ALL, "triton_python_backend_utils", allowed=()) == []


@pytest.mark.parametrize("package", NOWHERE)
def test_imported_nowhere(package: str) -> None:
    assert foreign(ALL, package, allowed=()) == []


def dangerous_calls(source: str) -> list[str]:
    """os.environ and os.getenv, eval and exec, torch.load, shell=True."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Call)) else ""
        if isinstance(node, ast.Attribute) and text in (
            "os.environ",
            "os.getenv",
            "os.putenv",
            "torch.load",
            "os.system",
        ):
            found.append(text)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(node.func.id)
        if isinstance(node, ast.keyword) and node.arg == "shell":
            found.append("shell=")
    return found


@pytest.mark.parametrize(("name", "path"), [pair for pair in MODULES.items() if pair[0] != "octavo.settings"])
def test_module_reads_no_environment_and_runs_no_text(name: str, path: Path) -> None:
    assert dangerous_calls(path.read_text(encoding="utf-8")) == []


def test_dangerous_calls_are_found() -> None:
    source = "import os\nos.environ['A']\neval('1')\ntorch.load('x')\nrun('ls', shell=True)\n"
    assert sorted(dangerous_calls(source)) == ["eval", "os.environ", "shell=", "torch.load"]


def simple_queues(source: str) -> set[str]:
    """Names that a module gives to a SimpleQueue, by assignment or annotation."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            kinds = [node.value, node.annotation] if isinstance(node, ast.AnnAssign) else [node.value]
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            if any("SimpleQueue" in ast.unparse(kind) for kind in kinds if kind is not None):
                found |= {ast.unparse(target).rpartition(".")[2] for target in targets}
        if isinstance(node, ast.arg) and node.annotation is not None and "SimpleQueue" in ast.unparse(node.annotation):
            found |= {node.arg, "_" + node.arg}
    return found


def limited_gets(source: str, names: set[str]) -> list[str]:
    """`get` with a time limit of a queue that has one of these names."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "get"
        and ast.unparse(call.func.value).rpartition(".")[2] in names
        and (len(call.args) > 1 or any(keyword.arg == "timeout" for keyword in call.keywords))
    ]


def test_no_simple_queue_is_asked_with_a_time_limit() -> None:
    """Of C's SimpleQueue (CPython 3.10 to 3.12): what is left of the limit after a wake-up without an item may be
    below zero, which its lock takes for no limit at all. `queue.Queue` has no such moment.
    """
    sources = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}
    names = set().union(*map(simple_queues, sources.values()))
    assert "_results" in names  # the engine's
    assert {name: found for name, source in sources.items() if (found := limited_gets(source, names))} == {}


def test_gets_with_a_time_limit_are_found() -> None:
    making = "self._plans: queue.Queue[int] = queue.SimpleQueue()\ndef wait(items: SimpleQueue[int]): ...\n"
    assert simple_queues(making) == {"_plans", "items", "_items"}
    asking = "self._plans.get(timeout=1)\nitems.get(True, 0.1)\nitems.get()\nothers.get(timeout=1)\n"
    assert limited_gets(asking, {"_plans", "items"}) == ["self._plans.get(timeout=1)", "items.get(True, 0.1)"]


def test_every_module_opens_with_a_docstring() -> None:
    bare = [
        name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert bare == []


def test_model_py_is_found_where_triton_looks() -> None:
    assert (REPOSITORY / "model_repository" / "model" / "1" / "model.py").is_file()
    assert (REPOSITORY / "model_repository" / "model" / "config.pbtxt").is_file()
