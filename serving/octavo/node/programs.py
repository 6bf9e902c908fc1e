"""What node starts: settings, sockets, paths and command lines, fixed before the first child runs.

Makes no process itself.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from octavo.node import run_dir, triton
from octavo.node.children import Program
from octavo.node.ports import LOOPBACK, check_free, listen
from octavo.settings import Settings

ENGINE = (sys.executable, "-m", "octavo.engine")
GATEWAY = (sys.executable, "-m", "octavo.gateway")
PUBLIC_PORTS = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "PUSH_MODE_HTTP_PORT")


@dataclass(frozen=True)
class Programs:
    """The command lines of our own processes and the model repository; tests put stand-ins here."""

    engine: tuple[str, ...] = ENGINE
    gateway: tuple[str, ...] = GATEWAY  # gets --fd N --beat N
    model_repository: Path = triton.MODEL_REPOSITORY


@dataclass(frozen=True)
class Plan:
    """Everything that was decided and opened before the start."""

    settings: Settings
    programs: Programs
    environ: Mapping[str, str]  # of every child
    install: triton.TritonInstall
    prepared: Path  # links that Triton needs
    health_socket: socket.socket
    metrics_socket: socket.socket
    gateway_socket: socket.socket | None
    node: run_dir.ProcessId
    follow: bool = False  # what the children log goes to node's standard output too
    shm_prefix: str = field(default_factory=lambda: f"{run_dir.SHM_PREFIX}{secrets.token_hex(8)}_")

    @property
    def gateway_names(self) -> list[str]:
        workers = self.settings.push_mode_http_workers if self.gateway_socket else 0
        return [f"gateway-{number}" for number in range(1, workers + 1)]

    @property
    def names(self) -> list[str]:
        return ["engine", "triton", *self.gateway_names]

    @property
    def logs(self) -> dict[str, Path]:
        return {name: self.settings.log_dir / f"{name}.log" for name in self.names}

    @property
    def ports(self) -> dict[str, int]:
        return {name: getattr(self.settings, name.lower()) for name in PUBLIC_PORTS}

    @property
    def about(self) -> dict[str, object]:
        """Facts for the health page."""
        return {"pid": self.node.pid, "served_model_name": self.settings.served_model_name, "ports": self.ports}

    @property
    def engine(self) -> Program:
        return Program("engine", self.programs.engine, self.environ, self.logs["engine"])

    def gateway(self, name: str, *, beat: int) -> Program:
        """One worker on the shared listening socket; `beat` is the pipe on which it shows that it lives."""
        assert self.gateway_socket is not None
        handle = self.gateway_socket.fileno()
        argv = (*self.programs.gateway, "--fd", str(handle), "--beat", str(beat))
        return Program(name, argv, self.environ, self.logs[name], pass_fds=(handle, beat))

    def triton(self, *, metrics_port: int, secret: str) -> Program:
        """Triton itself does not watch its parent, so the kernel kills it."""
        ports = triton.TritonPorts(self.settings.host, self.settings.grpc_port, metrics_port)
        argv = triton.command(
            self.install,
            prepared=self.prepared,
            repository=self.programs.model_repository,
            ports=ports,
            shm_prefix=self.shm_prefix,
            secret=secret,
        )
        environ = triton.environ(self.environ, self.install, prepared=self.prepared)
        return Program("triton", argv, environ, self.logs["triton"], death_signal=signal.SIGKILL)

    def write_record(self, children: tuple[run_dir.ProcessId, ...]) -> None:
        """Tell the stop command what runs now."""
        record = run_dir.Record(
            node=self.node,
            drain_seconds=self.settings.drain_seconds,
            shm_prefix=self.shm_prefix,
            ports=self.ports,
            children=children,
        )
        run_dir.write_record(self.settings.run_dir, record)


def make_plan(settings: Settings, programs: Programs, environ: Mapping[str, str], *, follow: bool = False) -> Plan:
    """Find Triton, open the sockets, check the other ports. Raises NodeError."""
    install = triton.find_triton(settings)
    node = run_dir.ProcessId.of(os.getpid())
    assert node is not None
    check_free("GRPC_PORT", settings.host, settings.grpc_port)
    check_free("INFER_QUEUE_PORT", LOOPBACK, settings.infer_queue_port)
    gateway_port = settings.push_mode_http_port
    return Plan(
        settings=settings,
        programs=programs,
        environ=environ,
        install=install,
        prepared=triton.prepare(install, settings.run_dir / "triton"),
        health_socket=listen("HTTP_PORT", settings.host, settings.http_port),
        metrics_socket=listen("METRICS_PORT", settings.host, settings.metrics_port),
        gateway_socket=listen("PUSH_MODE_HTTP_PORT", settings.host, gateway_port) if gateway_port != -1 else None,
        node=node,
        follow=follow,
    )
