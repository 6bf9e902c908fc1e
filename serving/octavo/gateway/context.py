"""What every handler of a gateway worker shares: settings, the way to the model, clocks, randomness, what is known of
the model.

One per worker, made by the app factory, used on its event loop only. Knows no routes.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from octavo.gateway.upstream import Upstream
from octavo.protocol.errors import NotFound, OctavoError
from octavo.settings import Settings

INFO_SECONDS = 0.5  # how long an answer about the model's state is taken as true


@dataclass
class Context:
    """Passed to every handler; `created` is when this worker began, in Unix seconds."""

    settings: Settings
    upstream: Upstream
    clock: Callable[[], float] = time.monotonic
    wall_clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex
    draw_seed: Callable[[], int] = lambda: secrets.randbits(63)
    created: int = 0
    max_model_len: int | None = None
    _info: dict[str, object] = field(default_factory=dict)
    _info_at: float = float("-inf")
    _info_lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.created = int(self.wall_clock())

    async def info(self) -> dict[str, object]:
        """The front end's answer to op info; {"state": "down"} if there is none. Many callers make one question."""
        async with self._info_lock:
            if self.clock() - self._info_at > INFO_SECONDS:
                self._info = await self._ask_info()
                self._info_at = self.clock()
            return self._info

    async def _ask_info(self) -> dict[str, object]:
        try:
            info = await self.upstream.ask({"op": "info"}, timeout=2.0)
        except OctavoError as error:
            return {"state": "down", "reason": error.message}
        model = info.get("model")
        if isinstance(model, dict) and isinstance(model.get("context_length"), int):
            self.max_model_len = model["context_length"]
        return info

    def check_model(self, name: object) -> str:
        """The name to answer with. Raises NotFound under STRICT_MODEL for any name but ours."""
        served = self.settings.served_model_name
        if not isinstance(name, str) or not name:
            return served
        if self.settings.strict_model and name != served:
            raise NotFound(f"the model {name[:200]!r} does not exist", field="model", code="model_not_found")
        return name
