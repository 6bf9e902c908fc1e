"""The images, built and run for real: no container engine is needed, but root, buildah and debootstrap are.

OCTAVO_IMAGES names a folder in which everything is kept for the next run, whose builds take up the layers that are
there. The CUDA image is built on a stand-in for Triton's, Debian with the wheel's Triton where the official image has
its own, and runs on the CPU. A real NVIDIA container is not tried here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.containers import DEBIAN, Builder, Container, missing, running
from server.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.skipif(bool(missing()), reason=missing())]

TRITON_IMAGE = "nvcr.io/nvidia/tritonserver:26.11-py3"
PACKAGES = "opt/venv/lib/python3.11/site-packages"
SMALL = {"BLOCK_BS": "4", "NUM_THREADS": "2"}


@dataclass(frozen=True)
class Image:
    """A built one, opened."""

    name: str
    root: Path
    config: dict[str, Any]


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    kept = os.environ.get("OCTAVO_IMAGES")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("images")
    one = Builder(folder, keep=kept is not None)
    one.make_debian()
    yield one
    one.buildah("rm", "--all")
    if kept is None:
        shutil.rmtree(folder)


def opened(builder: Builder, name: str) -> Image:
    container, root = builder.open(name)
    return Image(name, root, builder.config(container))


@pytest.fixture(scope="module")
def cpu(builder: Builder) -> Image:
    builder.build("Dockerfile_serving_cpu", "octavo-cpu")
    print(f"octavo-cpu: {builder.size('octavo-cpu')}; {DEBIAN}: {builder.size(DEBIAN)}")
    return opened(builder, "localhost/octavo-cpu")


@pytest.fixture(scope="module")
def cuda(builder: Builder, cpu: Image) -> Image:
    """Built on the stand-in."""
    container, root = builder.open(DEBIAN)
    install = "apt-get update && apt-get install -y --no-install-recommends python3 libpython3.11"
    builder.buildah("run", "--isolation", "chroot", container, "--", "sh", "-c", install, timeout=300)
    shutil.copytree(cpu.root / PACKAGES / "pytriton" / "tritonserver", root / "opt" / "tritonserver", symlinks=True)
    shutil.copytree(cpu.root / PACKAGES / "nvidia_pytriton.libs", root / "nvidia_pytriton.libs", symlinks=True)
    builder.buildah("commit", "-q", "--rm", container, TRITON_IMAGE)
    builder.build("Dockerfile_serving_cuda", "octavo-cuda")
    return opened(builder, "localhost/octavo-cuda")


def ask(container: Container) -> dict[str, Any]:
    """The README's curl."""
    url = f"{container.url('PUSH_MODE_HTTP_PORT')}/v1/chat/completions"
    data = '{"text": "hello, llm"}'
    command = ["curl", "-s", url, "-H", "Content-Type: application/json", "-d", data]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return httpx.Response(200, text=done.stdout).json()


def test_the_cpu_image_holds_what_it_should(cpu: Image) -> None:
    config = cpu.config
    assert config["User"] == "10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["WorkingDir"] == "/opt/output/Serving"
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "octavo.node.ready"]
    assert not (cpu.root / "models").exists()
    product = cpu.root / "opt/output/Serving"
    assert {"start_server.sh", "stop_server.sh", "demo"} <= {path.name for path in product.iterdir()}
    assert not (product / "tests").exists()
    assert not list(product.rglob("*_cache"))


def test_it_serves_without_rights_and_drains_when_asked_to_stop(cpu: Image) -> None:
    with running(cpu.root, cpu.config, shm="64m", MAX_DEC_LEN="4000", **SMALL) as container:
        container.wait_ready(seconds=90)
        said = "".join(container.lines)
        assert said.count("/dev/shm is small (6") == 1
        answer = ask(container)
        assert answer["error_code"] == 0
        assert answer["tokens_all"]
        status = Path(f"/proc/{container.init}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        assert fields["NSpid"].split()[-1] == "1"
        assert set(fields["Uid"].split()) == {"10001"}
        assert fields["CapEff"].strip("0") == fields["CapBnd"].strip("0") == ""
        assert fields["NoNewPrivs"] == "1"
        lines, begun = [], threading.Event()
        stream = threading.Thread(target=read_stream, args=(container, lines, begun))
        stream.start()
        assert begun.wait(30)
        assert container.stop() == 0
        stream.join(30)
    last = httpx.Response(200, text=lines[-1]).json()
    assert (last["is_end"], last["error_code"], last["tokens_all_num"]) == (1, 0, 600)
    said = "".join(container.lines)
    assert "[engine] " in said
    assert "[gateway-1] " in said
    assert "Traceback" not in said


def read_stream(container: Container, lines: list[str], begun: threading.Event) -> None:
    """Read a request that takes some seconds."""
    body = {"text": "hello", "max_dec_len": 600, "ignore_eos": True, "stream": True}
    url = f"{container.url('PUSH_MODE_HTTP_PORT')}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=100) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            begun.set()


def test_the_health_check_says_what_the_server_says(cpu: Image) -> None:
    with running(cpu.root, cpu.config, **SMALL) as container:
        check = [*cpu.config["Healthcheck"]["Test"][1:]]
        ports = {"HTTP_PORT": container.ports["HTTP_PORT"]}
        environ = {**dict(item.split("=", 1) for item in cpu.config["Env"]), **ports}
        inside = ["chroot", "--userspec=10001:10001", str(cpu.root), "env", "-i"]
        command = [*inside, *(f"{name}={value}" for name, value in environ.items()), *check]
        before = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        container.wait_ready(seconds=90)
        after = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert before.returncode == 1
    assert (after.returncode, after.stdout.strip()) == (0, "ready")


def test_the_long_form_with_a_shell_and_a_mounted_model_works(cpu: Image) -> None:
    """`docker run … bash -c '…'`, the form that people know from other servers of this interface."""
    long_form = "export USE_CACHE_KV_INT8=1 && cd /opt/output/Serving && bash start_server.sh; exec bash"
    (cpu.root / "models").mkdir()  # what an engine makes for a mount
    try:
        with running(
            cpu.root, cpu.config, "bash", "-c", long_form, model=REPOSITORY / "demo" / "model",
            stdin=subprocess.PIPE, **SMALL,
        ) as container:  # fmt: skip
            container.wait_ready(seconds=90)
            answer = ask(container)
            assert container.process.stdin is not None
            container.process.stdin.write("bash stop_server.sh\nexit 7\n")
            container.process.stdin.close()
            assert container.process.wait(60) == 7
    finally:
        (cpu.root / "models").rmdir()
    said = "".join(container.lines)
    assert answer["error_code"] == 0
    assert "starting /models" in said
    assert "octavo: ready in" in said
    assert "octavo: stopped" in said


def test_the_cuda_image_builds_on_a_stand_in_and_uses_its_triton(cuda: Image) -> None:
    assert not (cuda.root / PACKAGES / "pytriton").exists()
    with running(cuda.root, cuda.config, **SMALL) as container:
        container.wait_ready(seconds=90)
        assert ask(container)["error_code"] == 0
        node = container.init
        family = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
        servers = [line.split(None, 1)[1] for line in family.splitlines() if line.split(None, 1)[0] == str(node)]
        assert any(line.startswith("/opt/tritonserver/bin/tritonserver") for line in servers)
        assert container.stop() == 0
