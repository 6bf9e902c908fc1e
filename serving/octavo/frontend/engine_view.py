"""What the front end knows of the engine: data under the registry's lock, read by ops and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from octavo.protocol.messages import EngineInfo, EngineStats


class Phase(Enum):
    LOADING = "loading"  # no engine yet
    READY = "ready"
    DOWN = "down"  # there was one; another may come
    CLOSED = "closed"  # none will come


@dataclass(slots=True)
class EngineView:
    """What was last heard of the engine."""

    phase: Phase = Phase.LOADING
    reason: str = "the engine is starting"
    stage: str = "starting"
    fraction: float = 0.0
    info: EngineInfo | None = None
    stats: EngineStats | None = None
    heard_at: float = 0.0
    attached_at: float = 0.0  # the last time
    changed_at: float = 0.0
    epoch: int = 0
