#!/usr/bin/env bash
# The images' entry point. Without a command it becomes node, in the foreground, so that `docker stop` drains the
# server and `docker logs` shows everything; with one it becomes that command.
set -euo pipefail

if [ $# -eq 0 ]; then
    exec python -m octavo.node --follow
fi
exec "$@"
