"""All tests, as `make test` runs them: the soak, most of whose three minutes are other processes', beside the tests
that only compute, then the others alone, for some of those measure time.

    python tests/lanes.py [options of pytest]

Each file runs in exactly one lane. The exit code is zero if all of them passed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOAK = HERE / "chaos" / "test_soak.py"
COMPUTING = tuple(
    HERE / name for name in ("kernels", "kernels_gpu", "models", "protocol", "quantization", "quantize", "scheduling")
)


def command(*arguments: object, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", *map(str, arguments), *options]


def main(options: list[str]) -> int:
    """Run every lane, whatever the others find."""
    print(f"lanes: {SOAK.name} beside {', '.join(path.name for path in COMPUTING)}; then all others", flush=True)
    with tempfile.TemporaryFile() as output:
        soak = subprocess.Popen(command(SOAK, options=options), stdout=output, stderr=subprocess.STDOUT)
        try:
            codes = [subprocess.call(command(*COMPUTING, options=options))]
            codes.append(soak.wait())
        finally:
            soak.terminate()
            soak.wait()
        output.seek(0)
        print(output.read().decode(errors="replace"), flush=True)
    ignored = [f"--ignore={path}" for path in (SOAK, *COMPUTING)]
    codes.append(subprocess.call(command(HERE, *ignored, options=options)))
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
