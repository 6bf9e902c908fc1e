"""The `octavo` command: finds the module of a subcommand and runs it.

Imports nothing of a subcommand before it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

from octavo import __version__

COMMANDS = {
    "env": "every environment variable: default, allowed values, meaning",
    "doctor": "is everything here that the server needs?",
    "chat": "talk to a server in the terminal",
    "bench": "measure a server: throughput, time to first token, gaps",
    "inspect": "what a checkpoint holds and how it would be loaded",
    "quantize": "make an int8 checkpoint of a float one",
    "merge": "fold a LoRA adapter into a float checkpoint",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code. 2: no such command, or not in this version."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given and given[0] in COMMANDS else None
    parser = make_parser(name)
    if name is not None and (module := load(name)) is not None:
        command = argparse.ArgumentParser(prog=f"octavo {name}", description=COMMANDS[name])
        module.add_arguments(command)
        return int(module.run(command.parse_args(given[1:])))
    if name is not None:
        print(f"octavo: error: `octavo {name}` is not available in this version", file=sys.stderr)
        return 2
    parser.parse_args(given or ["--help"])
    return 2


def make_parser(name: str | None) -> argparse.ArgumentParser:
    """The parser that explains; subcommands parse their own arguments."""
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {command:{width}}  {text}" for command, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="octavo", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"commands:\n{listing}"
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="command")
    return parser


def load(name: str) -> ModuleType | None:
    """The module of a subcommand; None if this version has none."""
    full = f"octavo.cli.{name}"
    return importlib.import_module(full) if importlib.util.find_spec(full) is not None else None


if __name__ == "__main__":
    sys.exit(main())
