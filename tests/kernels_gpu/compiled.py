"""Compiles GPU kernels on a machine without a GPU and reads the machine code: what it runs on and what it costs.

`python -m kernels_gpu.compiled` (from tests/, the package on the path) prints every case; `--write` records budgets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).with_name("budgets.json")
CAPABILITIES = (80, 90, 100)
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)\s*([^;]*);")


@dataclass(frozen=True)
class Case:
    """One kernel with one set of constants and shapes, as a model would launch it."""

    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are no constants
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()  # integers that are multiples of 16
    num_warps: int = 4
    num_stages: int = 3
    mma: dict[int, str] | None = None  # capability → prefix of the tensor-core instruction
    loop_bytes: int = 0  # bytes of weights or cache that the innermost loop reads in one turn
    capabilities: tuple[int, ...] = CAPABILITIES


@dataclass(frozen=True)
class Report:
    """What the compiled code is made of."""

    registers: int
    shared_bytes: int
    spills: int  # local loads and stores
    byte_loads: int  # 1-byte loads from global memory
    instructions: int
    loop_instructions: int  # of the innermost loop; 0 without one
    instructions_per_byte: float  # threads' instructions for each byte the loop reads
    fused: int  # fused multiply-adds that round differently from a product and a sum
    mma: list[str]


def build(case: Case, capability: int) -> Report:
    """What a case compiles to. Raises what triton-lang raises if it cannot be."""
    compiled = compile_case(case, capability)
    return _read(_disassemble(compiled.asm["cubin"]), compiled, case)


def compile_case(case: Case, capability: int) -> Any:
    """A case as triton-lang compiles it."""
    import triton

    return triton.compile(_source(case, capability), target=_target(capability), options=_options(case))


def tensor_code(case: Case, capability: int) -> str:
    """A case as triton-lang reads it, its functions inlined: quickly made, one value a line."""
    from triton.compiler.compiler import ir, make_backend

    source, backend = _source(case, capability), make_backend(_target(capability))
    options = backend.parse_options({**source.parse_options(), **_options(case)})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    implementations = backend.get_codegen_implementation(options)
    module = source.make_ir(_target(capability), options, implementations, backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def _target(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", capability, 32)


def _options(case: Case) -> dict[str, Any]:
    return {
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
        "enable_fp_fusion": False,
        "launch_pdl": bool(case.constants.get("PDL", False)),
    }


def _source(case: Case, capability: int) -> Any:
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    values = dict(case.constants)
    if "PACKED" in names:
        values["PACKED"] = capability >= 100
    if "PDL" in names:
        values.setdefault("PDL", False)
    signature = {name: "constexpr" if name in values else case.types[name] for name in names}
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in signature.items()
        if kind.startswith("*") or name in case.aligned
    }
    return ASTSource(
        case.kernel, signature, {(names.index(name),): value for name, value in values.items()}, attributes
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([str(tool), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        )


def _read(texts: tuple[str, str], compiled: Any, case: Case) -> Report:
    code, usage = texts
    lines = [(int(address, 16), name, rest) for address, name, rest in LINE.findall(code)]
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    loop = _innermost_loop(lines)
    return Report(
        registers=int(registers[1]),
        shared_bytes=compiled.metadata.shared,
        spills=sum(name.startswith(("STL", "LDL")) for _, name, _ in lines),
        byte_loads=sum(name.startswith("LDG") and re.search(r"\.[US]8", name) is not None for _, name, _ in lines),
        instructions=len(lines),
        loop_instructions=loop,
        instructions_per_byte=round(loop * 32 * case.num_warps / case.loop_bytes, 2) if case.loop_bytes else 0.0,
        # times 256, as limbs are joined, is exact and may be fused
        fused=sum(name.startswith("FFMA") and ", 256, " not in rest for _, name, rest in lines),
        mma=sorted({name for _, name, _ in lines if re.match(r"(I|H|IG|HG|Q|QG|UTC\w*)MMA", name)}),
    )


def _innermost_loop(lines: list[tuple[int, str, str]]) -> int:
    """Instructions of the shortest loop that has a tensor-core product, or of the shortest at all."""
    bodies = []
    for address, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = [other for place, other, _ in lines if int(target[1], 16) <= place <= address]
        bodies.append((not any("MMA" in other for other in body), len(body)))
    return min(bodies)[1] if bodies else 0


def main() -> None:
    from kernels_gpu.cases import all_cases

    found: dict[str, dict[str, Any]] = {}
    for case in all_cases():
        for capability in case.capabilities:
            report = build(case, capability)
            print(f"{case.name:36} sm_{capability} {report}", flush=True)
            found.setdefault(case.name, {})[str(capability)] = asdict(report)
    if "--write" in sys.argv:
        BUDGETS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
