"""The images' health check: `python -m octavo.node.ready` asks /v2/health/ready and says what it said.

A process of its own, beside the server and with its variables. Exit code 0: ready.
"""

from __future__ import annotations

import http.client
import sys

from octavo.settings import Settings, SettingsError

SECONDS = 3.0


def main() -> int:
    """Print the state in one line."""
    try:
        settings = Settings.from_environ()
    except SettingsError as error:
        print(error)
        return 1
    connection = http.client.HTTPConnection(settings.local_address, settings.http_port, timeout=SECONDS)
    try:
        connection.request("GET", "/v2/health/ready")
        answer = connection.getresponse()
        print(answer.read().decode(errors="replace").strip())
        return 0 if answer.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
