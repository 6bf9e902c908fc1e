"""Finds the model folder before anything starts; fetches it when MODEL_DIR is a hub id.

Start command and node's main thread.
"""

from __future__ import annotations

import re
from pathlib import Path

from octavo.node.errors import EXIT_BAD_SETTINGS, NodeError
from octavo.settings import Settings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FETCHED = ("*.safetensors", "*.json", "tokenizer*", "*.jinja", "*.model", "*.txt")


def resolve_model(settings: Settings) -> dict[str, str]:
    """Check the folder, or fetch it. Returns the variables that change for the children; raises NodeError."""
    folder = Path(settings.model_dir)
    if folder.is_dir() or not HUB_ID.fullmatch(settings.model_dir):
        check_folder(folder, settings.model_config_path)
        return {}
    fetched = _fetch(settings)
    config = settings.model_config_path
    check_folder(fetched, config if config.exists() else fetched / "config.json")
    return {"MODEL_DIR": str(fetched), "SERVED_MODEL_NAME": settings.served_model_name}


def check_folder(folder: Path, config: Path) -> None:
    """Raise NodeError unless there is a Hugging Face model in the folder."""
    try:
        if not folder.is_dir():
            raise _bad(folder, "no such folder")
        if not config.is_file():
            raise _bad(folder, f"no model in it: {config} does not exist")
        if not any(folder.glob("*.safetensors")):
            raise _bad(folder, "no *.safetensors in it; other weight files (pickle, GGUF, static graphs) are not read")
    except PermissionError as error:
        raise _bad(folder, f"cannot be read: {error.strerror}") from None


def _fetch(settings: Settings) -> Path:
    from huggingface_hub import snapshot_download  # only when a hub id asks for it
    from huggingface_hub.errors import HfHubHTTPError

    print(f"octavo: fetching {settings.model_dir} from the hub (kept in the Hugging Face cache)", flush=True)
    try:
        found = snapshot_download(settings.model_dir, allow_patterns=list(FETCHED), token=settings.hf_token or None)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise _bad(settings.model_dir, f"cannot be fetched: {reason[0] if reason else type(error).__name__}") from None
    return Path(found)


def _bad(folder: Path | str, reason: str) -> NodeError:
    return NodeError(f"MODEL_DIR={folder}: {reason}", exit_code=EXIT_BAD_SETTINGS)
