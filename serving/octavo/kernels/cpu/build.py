"""Compiles csrc/*.cpp into two shared libraries from the same sources: for AVX2, and for AVX-512 with VNNI (and AMX,
where g++ knows it).

`python -m octavo.kernels.cpu.build [folder]` builds in place. A stamp with a hash of sources and flags sits beside
each library, so a second build does nothing. Knows g++ and files; knows nothing of torch or of what the functions do.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "csrc"
COMMON_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wall", "-Wno-psabi"),
    "-Wno-maybe-uninitialized",  # g++ 12 says so of its own vector headers
    # Every float operation rounds on its own, in the order written.
    *("-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
VARIANT_FLAGS = {"avx2": _AVX2, "avx512": (*_AVX2, *_AVX512)}

# What Linux calls the instructions of each variant, best first.
_AVX2_FLAGS = {"avx2", "fma", "f16c"}
_AVX512_FLAGS = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", *_AVX2_FLAGS}
NEEDED_FLAGS = {"amx": {"amx_tile", "amx_int8", *_AVX512_FLAGS}, "avx512": _AVX512_FLAGS, "avx2": _AVX2_FLAGS}


class BuildError(RuntimeError):
    """The compiler refused; the message holds its first lines."""


def library_path(folder: Path, variant: str) -> Path:
    """Where the library of `variant` ("avx2", "avx512", "amx") lies in `folder`; the last two share one."""
    return folder / f"liboctavo_cpu_{'avx512' if variant == 'amx' else variant}.so"


def build(output_dir: Path, *, sources: Path = SOURCES) -> Path | None:
    """Make both libraries in `output_dir` unless they are up to date, and return it; None if there is no compiler.

    Safe for several processes at once. Raises BuildError if the compiler fails and OSError if the folder cannot be
    written.
    """
    if all(is_current(output_dir, variant, sources=sources) for variant in VARIANT_FLAGS):
        return output_dir
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / ".build.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for variant in VARIANT_FLAGS:
            if not is_current(output_dir, variant, sources=sources):
                _compile(compiler, output_dir, variant, sources)
    return output_dir


def is_current(folder: Path, variant: str, *, sources: Path = SOURCES) -> bool:
    """True if the library exists and was built from these sources with these flags."""
    stamp = _stamp_path(folder, variant)
    exists = library_path(folder, variant).is_file() and stamp.is_file()
    return exists and stamp.read_text().strip() == _fingerprint(variant, sources)


def _stamp_path(folder: Path, variant: str) -> Path:
    return library_path(folder, variant).with_suffix(".stamp")


def _fingerprint(variant: str, sources: Path) -> str:
    digest = hashlib.sha256(" ".join([*COMMON_FLAGS, *VARIANT_FLAGS[variant]]).encode())
    for path in sorted(sources.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _compile(compiler: str, folder: Path, variant: str, sources: Path) -> None:
    """Compile every source on its own, link, and move the library into place in one step."""
    fingerprint = _fingerprint(variant, sources)
    flags = [*COMMON_FLAGS, *VARIANT_FLAGS[variant]]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sorted(sources.glob("*.cpp"))]
        jobs = [
            subprocess.Popen(
                [compiler, *flags, "-c", str(sources / f"{item.stem}.cpp"), "-o", str(item)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for item in objects
        ]
        errors = [(job.communicate()[1], job.returncode) for job in jobs]
        _check(errors)
        built = Path(scratch) / "library.so"
        command = [compiler, *flags, *map(str, objects), "-o", str(built)]
        linked = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        _check([(linked.stderr, linked.returncode)])
        built.replace(library_path(folder, variant))
    _stamp_path(folder, variant).write_text(fingerprint + "\n")


def _check(results: list[tuple[str, int]]) -> None:
    failed = [error for error, code in results if code != 0]
    if failed:
        raise BuildError("g++ failed: " + "\n".join("\n".join(failed).splitlines()[:40]))


def main() -> None:
    """Build in place, or in the folder named on the command line."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    if build(target) is None:
        sys.exit("no C++ compiler: install g++, or run with the reference kernels")
    print(f"CPU kernels are in {target}")


if __name__ == "__main__":
    main()
