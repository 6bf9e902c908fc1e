#!/usr/bin/env bash
# Drains and stops the server that start_server.sh started. Exit code 0 also if none runs.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/deploy/environment.sh"

find_python
exec "$python" -m octavo.node.stop
