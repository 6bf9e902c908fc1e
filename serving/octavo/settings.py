"""Every environment variable: name, default, allowed values, meaning. The only reader of os.environ.

Each process builds one frozen `Settings` at start and passes it down. A bad value raises `SettingsError` with one line:
name, value, what is allowed. A variable that is one letter off a known name gets a warning that names the right one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from octavo.settings_kinds import choice, flag, integer, number, path, text, words

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_MODEL = REPOSITORY / "demo" / "model"
MODEL_MOUNT = Path("/models/")


class SettingsError(ValueError):
    """A variable has a value that is not allowed; the message is one line for the user."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(f"{name}={value!s}: {allowed}")
        self.name = name


@dataclass(frozen=True)
class Variable:
    """One documented environment variable and the `Settings` field it fills."""

    name: str
    field: str
    parse: Callable[[str], object]
    default: str | None
    allowed: str
    doc: str
    aliases: tuple[str, ...] = ()
    internal: bool = False


def _variable(
    name: str,
    field: str,
    kind: tuple[Callable[[str], object], str],
    default: str | None,
    doc: str,
    *,
    aliases: tuple[str, ...] = (),
    internal: bool = False,
) -> Variable:
    return Variable(name, field, kind[0], default, kind[1], doc, aliases, internal)


PORT = integer(1, 65535)

VARIABLES: tuple[Variable, ...] = (
    _variable(
        "MODEL_DIR",
        "model_dir",
        text(),
        None,
        "Model folder (config.json, safetensors, tokenizer) or a hub id; default /models/ if it exists, "
        "else the bundled demo model",
    ),
    _variable(
        "FD_MODEL_CONFIG_PATH",
        "model_config_path",
        path(),
        None,
        "config.json elsewhere; default MODEL_DIR/config.json",
    ),
    _variable(
        "DISTRIBUTED_CONFIG",
        "distributed_config",
        path(),
        None,
        "where ranks live, for several nodes; default MODEL_DIR/rank_mapping.csv",
    ),
    _variable("MP_NUM", "mp_num", integer(1, 64), "1", "tensor-parallel degree"),
    _variable("CUDA_VISIBLE_DEVICES", "visible_devices", text(), None, "devices to use; default all"),
    _variable("HTTP_PORT", "http_port", PORT, "8110", "health", aliases=("HEALTH_HTTP_PORT",)),
    _variable("GRPC_PORT", "grpc_port", PORT, "8811", "Triton gRPC", aliases=("SERVICE_GRPC_PORT",)),
    _variable("METRICS_PORT", "metrics_port", PORT, "8722", "Prometheus metrics", aliases=("METRICS_HTTP_PORT",)),
    _variable(
        "INFER_QUEUE_PORT",
        "infer_queue_port",
        PORT,
        "8813",
        "front end to engine, loopback only",
        aliases=("INTER_PROC_PORT",),
    ),
    _variable(
        "PUSH_MODE_HTTP_PORT",
        "push_mode_http_port",
        integer(1, 65535, (-1,)),
        "9965",
        "HTTP gateway; -1: gRPC only",
        aliases=("SERVICE_HTTP_PORT",),
    ),
    _variable("PUSH_MODE_HTTP_WORKERS", "push_mode_http_workers", integer(1, 8), "1", "gateway processes"),
    _variable("HOST", "host", text(), "0.0.0.0", "address the public ports bind to; all else is loopback"),
    _variable(
        "DISABLE_STREAMING", "disable_streaming", flag(), "0", "1: only the last message of each request is sent"
    ),
    _variable("MAX_SEQ_LEN", "max_seq_len", integer(1, 1 << 24), "8192", "most input tokens of a request"),
    _variable("MAX_DEC_LEN", "max_dec_len", integer(1, 1 << 24), "1024", "most output tokens of a request"),
    _variable("BATCH_SIZE", "batch_size", integer(1, 128), "50", "sequences running at once"),
    _variable(
        "BLOCK_BS",
        "block_bs",
        number(0, 1e6),
        None,
        "cache size in sequences of min(MAX_SEQ_LEN + MAX_DEC_LEN, context); unset: from free memory",
    ),
    _variable(
        "KV_MEMORY_FRACTION",
        "kv_memory_fraction",
        number(0, 1),
        None,
        "share of free memory for the cache when BLOCK_BS is unset; default 0.9 of a GPU's, 0.25 of a host's",
    ),
    _variable("BLOCK_RATIO", "block_ratio", number(0, 1), "0.75", "accepted, no effect"),
    _variable("BLOCK_SIZE", "block_size", integer(64, 64), "64", "tokens in a cache block; 64 only"),
    _variable(
        "MAX_CACHED_TASK_NUM",
        "max_cached_task_num",
        integer(0, 100_000),
        "128",
        "waiting requests; beyond it: refused at once",
    ),
    _variable("USE_WARMUP", "use_warmup", flag(), "0", "1: warm up before ready"),
    _variable("USE_CACHE_KV_INT8", "use_cache_kv_int8", flag(), "1", "0: cache in the model's float type"),
    _variable("USE_HF_TOKENIZER", "use_hf_tokenizer", flag(), "1", "accepted, no effect: it is the only one"),
    _variable(
        "WEIGHT_QUANT",
        "weight_quant",
        choice("auto", "none", "wint8", "a8w8"),
        "auto",
        "for float checkpoints: none, wint8 (auto: most exact), a8w8 (fastest)",
    ),
    _variable(
        "HEAD_QUANT",
        "head_quant",
        choice("none", "wint8", "a8w8"),
        "none",
        "a float lm_head of any checkpoint: none keeps it, wint8 halves what a step reads for it, a8w8 is fastest",
    ),
    _variable("DTYPE", "dtype", choice("auto", "bfloat16", "float16", "float32"), "auto", "type of float layers"),
    _variable(
        "SERVED_MODEL_NAME", "served_model_name", text(), None, "name on OpenAI routes; default the folder's name"
    ),
    _variable("STRICT_MODEL", "strict_model", flag(), "0", "1: an unknown model name is 404"),
    _variable(
        "API_KEYS", "api_keys", words(), None, "comma-separated; when set every gateway route but health needs one"
    ),
    _variable("MAX_BODY_BYTES", "max_body_bytes", integer(1024, 1 << 30), str(4 << 20), "largest request body"),
    _variable(
        "MAX_CONNECTIONS",
        "max_connections",
        integer(1, 1 << 20),
        "4096",
        "open HTTP connections of each gateway worker; beyond it: 503",
    ),
    _variable(
        "TLS_CERTFILE",
        "tls_certfile",
        path(),
        None,
        "certificate chain (PEM): the gateway then speaks HTTPS; needs TLS_KEYFILE",
    ),
    _variable("TLS_KEYFILE", "tls_keyfile", path(), None, "private key of TLS_CERTFILE (PEM, without a passphrase)"),
    _variable(
        "LOG_LEVEL", "log_level", choice("DEBUG", "INFO", "WARNING", "ERROR"), "INFO", "least level that is logged"
    ),
    _variable(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "otlp_endpoint",
        text(),
        None,
        "address of an OpenTelemetry collector (OTLP over HTTP): the gateway then traces requests; needs octavo[otel]",
    ),
    _variable("OTEL_SERVICE_NAME", "otel_service_name", text(), "octavo", "name of this server in traces"),
    _variable("LOG_DIR", "log_dir", path(), None, "log files; default RUN_DIR/log"),
    _variable(
        "RUN_DIR",
        "run_dir",
        path(),
        None,
        "locks, keys and pid files; default a private folder named after HTTP_PORT in the system's temporary directory",
    ),
    _variable(
        "DRAIN_SECONDS", "drain_seconds", integer(0, 86_400), "60", "time for accepted requests to end on a drain"
    ),
    _variable("START_SECONDS", "start_seconds", integer(1, 86_400), "900", "deadline for a start to become ready"),
    _variable(
        "MAX_NUM_BATCHED_TOKENS",
        "max_num_batched_tokens",
        integer(1, 1 << 20),
        None,
        "token budget of a step; unset: the device's default",
    ),
    _variable("PREFIX_CACHE", "prefix_cache", flag(), "1", "1: reuse cached blocks of equal prefixes"),
    _variable(
        "SPECULATION",
        "speculation",
        choice("none", "ngram"),
        "none",
        "ngram: guess tokens that follow what occurred before and verify several a step; same output, a request may "
        "say otherwise",
    ),
    _variable("SPECULATION_TOKENS", "speculation_tokens", integer(1, 32), "8", "most tokens guessed at once"),
    _variable("DEVICE", "device", choice("auto", "cpu", "cuda"), "auto", "where the model runs"),
    _variable(
        "KERNELS",
        "kernels",
        choice("auto", "reference", "avx2", "avx512", "amx", "gpu"),
        "auto",
        "kernel backend; auto: the fastest one that passes its self-test here",
    ),
    _variable("NUM_THREADS", "num_threads", integer(1, 1024), None, "threads of the CPU kernels; default all cores"),
    _variable("HF_TOKEN", "hf_token", text(), None, "token for a hub id in MODEL_DIR"),
    _variable(
        "TRITONSERVER_HOME",
        "tritonserver_home",
        path(),
        None,
        "folder with bin/tritonserver and backends/; default /opt/tritonserver, else the nvidia-pytriton wheel's",
    ),
    _variable("OCTAVO_NODE", "managed_by_node", flag(), "0", "set by the node for its children", internal=True),
)


@dataclass(frozen=True)
class Settings:
    """All settings of one server, checked. Field meanings are in `VARIABLES`; see `octavo env`."""

    model_dir: str
    model_config_path: Path
    distributed_config: Path
    mp_num: int
    visible_devices: str | None
    http_port: int
    grpc_port: int
    metrics_port: int
    infer_queue_port: int
    push_mode_http_port: int
    push_mode_http_workers: int
    host: str
    disable_streaming: bool
    max_seq_len: int
    max_dec_len: int
    batch_size: int
    block_bs: float | None
    kv_memory_fraction: float | None
    block_ratio: float
    block_size: int
    max_cached_task_num: int
    use_warmup: bool
    use_cache_kv_int8: bool
    use_hf_tokenizer: bool
    weight_quant: str
    head_quant: str
    dtype: str
    served_model_name: str
    strict_model: bool
    api_keys: tuple[str, ...]
    max_body_bytes: int
    max_connections: int
    tls_certfile: Path | None
    tls_keyfile: Path | None
    log_level: str
    log_dir: Path
    otlp_endpoint: str | None
    otel_service_name: str
    run_dir: Path
    drain_seconds: int
    start_seconds: int
    max_num_batched_tokens: int | None
    prefix_cache: bool
    speculation: str
    speculation_tokens: int
    device: str
    kernels: str
    num_threads: int | None
    hf_token: str | None
    tritonserver_home: Path | None
    managed_by_node: bool

    @property
    def local_address(self) -> str:
        """Where a process of this machine reaches what is bound to HOST."""
        return {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    def local_target(self, port: int) -> str:
        """That address and a port, as URLs and gRPC targets want them."""
        address = self.local_address
        return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read and check every variable. Raises SettingsError."""
        environ = os.environ if environ is None else environ
        values = {variable.field: _read(variable, environ) for variable in VARIABLES}
        _fill_paths(values)
        settings = cls(**{field.name: values[field.name] for field in fields(cls)})  # type: ignore[arg-type]
        _check_ports(settings)
        _check_tls(settings)
        return settings


def with_overrides(overrides: Mapping[str, object], environ: Mapping[str, str] | None = None) -> Settings:
    """The environment's settings with some fields given by a program, by field name. Raises SettingsError.

    Values are what the environment variable would say, or their Python form (True, 64, a Path, a tuple of words).
    """
    by_field = {variable.field: variable for variable in VARIABLES}
    given = dict(os.environ if environ is None else environ)
    for field, value in overrides.items():
        if field not in by_field:
            raise SettingsError(field, value, "is not a setting")
        variable = by_field[field]
        for name in (variable.name, *variable.aliases):
            given.pop(name, None)
        given[variable.name] = ",".join(value) if isinstance(value, tuple) else str(value)
    return Settings.from_environ(given)


def _read(variable: Variable, environ: Mapping[str, str]) -> object:
    given = [name for name in (variable.name, *variable.aliases) if environ.get(name, "") != ""]
    if len(given) > 1 and len({environ[name] for name in given}) > 1:
        raise SettingsError(given[1], environ[given[1]], f"contradicts {given[0]}={environ[given[0]]}")
    raw = environ[given[0]] if given else variable.default
    if raw is None:
        return None
    try:
        return variable.parse(raw)
    except (ValueError, KeyError):
        raise SettingsError(given[0] if given else variable.name, raw, variable.allowed) from None


def _fill_paths(values: dict[str, object]) -> None:
    """Defaults that follow from other values."""
    if values["model_dir"] is None:
        values["model_dir"] = str(MODEL_MOUNT if MODEL_MOUNT.is_dir() else DEMO_MODEL)
    model_dir = Path(str(values["model_dir"]))
    values["model_config_path"] = values["model_config_path"] or model_dir / "config.json"
    values["distributed_config"] = values["distributed_config"] or model_dir / "rank_mapping.csv"
    if values["served_model_name"] is None:
        values["served_model_name"] = "octavo-demo" if model_dir == DEMO_MODEL else model_dir.name or "model"
    values["api_keys"] = values["api_keys"] or ()
    if values["run_dir"] is None:
        values["run_dir"] = _temporary_dir() / f"octavo-{os.getuid()}" / str(values["http_port"])
    values["log_dir"] = values["log_dir"] or Path(str(values["run_dir"])) / "log"


def _temporary_dir() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        reason = "no temporary folder can be written; name one (docker: --tmpfs /tmp)"
        raise SettingsError("RUN_DIR", "", reason) from None


def _check_ports(settings: Settings) -> None:
    names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "INFER_QUEUE_PORT", "PUSH_MODE_HTTP_PORT")
    seen: dict[int, str] = {}
    for name in names:
        port = getattr(settings, name.lower())
        if port in seen:
            raise SettingsError(name, port, f"is also {seen[port]}; every port must be another one")
        seen[port] = name


def _check_tls(settings: Settings) -> None:
    files = {"TLS_CERTFILE": settings.tls_certfile, "TLS_KEYFILE": settings.tls_keyfile}
    given = {name: file for name, file in files.items() if file is not None}
    for name, file in given.items():
        if len(given) == 1:
            raise SettingsError(name, file, f"needs {next(other for other in files if other != name)} too")
        if not os.access(file, os.R_OK):
            raise SettingsError(name, file, "is not a file that can be read")


def known_names() -> set[str]:
    """Every name that is read, aliases included."""
    return {name for variable in VARIABLES for name in (variable.name, *variable.aliases)}


def misspelled(environ: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Pairs (given, known) of variables whose name is one edit away from a known one."""
    environ = os.environ if environ is None else environ
    known = known_names()
    return [
        (given, name)
        for given in sorted(environ)
        if given not in known
        for name in sorted(known)
        if len(name) > 4 and _one_edit_apart(given, name)
    ]


def _one_edit_apart(a: str, b: str) -> bool:
    """True if one insertion, deletion, substitution or swap of neighbours turns `a` into `b`."""
    if a == b or abs(len(a) - len(b)) > 1:
        return False
    start = 0
    while start < min(len(a), len(b)) and a[start] == b[start]:
        start += 1
    rest_a, rest_b = a[start:], b[start:]
    if len(a) == len(b):
        swapped = rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:]
        return rest_a[1:] == rest_b[1:] or swapped
    return rest_a[1:] == rest_b if len(a) > len(b) else rest_a == rest_b[1:]


def child_environ(settings: Settings) -> dict[str, str]:
    """The environment that a child process gets so that it reads the same settings."""
    return {**os.environ, "OCTAVO_NODE": "1", "RUN_DIR": str(settings.run_dir), "LOG_DIR": str(settings.log_dir)}


def set_thread_environ(settings: Settings) -> None:
    """Tell numeric libraries the number of threads. They read it when first imported: call this before torch is."""
    if settings.num_threads is not None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(settings.num_threads)
