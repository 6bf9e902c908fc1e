"""Whether requests are traced: only where OTEL_EXPORTER_OTLP_ENDPOINT is set and octavo[otel] is installed.

Used once when a gateway worker starts. OpenTelemetry is not imported unless it is asked for, so that it costs nothing
where it is off.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from octavo.settings import Settings

if TYPE_CHECKING:
    from octavo.gateway.tracing import Tracing

log = logging.getLogger("octavo.gateway")


def tracing_of(settings: Settings) -> Tracing | None:
    """What traces this worker's requests; None if nothing does."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from octavo.gateway.tracing import Tracing
    except ImportError:
        log.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces need: pip install octavo[otel]")
        return None
    return Tracing.exporting(settings)
