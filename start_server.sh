#!/usr/bin/env bash
# Starts the server and waits until it is ready. Works from any folder; `octavo env` lists the variables it reads.
#   bash start_server.sh             install what is missing (first time), start, wait
#   bash start_server.sh --check     only check: all that a start checks, and its exit code; nothing is started
#   bash start_server.sh --install   only install; with `--install test` also what the tests need
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/deploy/environment.sh"

case "${1:-}" in
    "" | --check | --install) ;;
    *) fail "unknown option $1; use --check or --install" ;;
esac
case "$(uname -s)-$(uname -m)" in
    Linux-x86_64) ;;
    *) fail "Triton's wheel runs on Linux x86_64 only; this is $(uname -s) $(uname -m)" ;;
esac

choose_python
if [ "${1:-}" = --install ]; then
    shift
    install_packages server "$@"
    exit 0
fi
install_packages server
if [ "${1:-}" = --check ]; then
    exec "$python" -m octavo.cli.main doctor --start
fi
exec "$python" -m octavo.node.launch
