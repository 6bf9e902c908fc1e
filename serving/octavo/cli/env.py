"""`octavo env`: the variables that settings.py knows, as a table for people or for the documentation. Sets nothing."""

from __future__ import annotations

import argparse
import sys

from octavo.settings import VARIABLES, Settings, SettingsError, Variable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="as the table that README.md holds")
    parser.add_argument("--check", action="store_true", help="only check the values that are set now")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, or one line about the first bad value (exit code 2)."""
    if arguments.check:
        return check()
    print(markdown_table() if arguments.markdown else terminal_table())
    return 0


def check() -> int:
    """Are the values that are set now allowed?"""
    try:
        Settings.from_environ()
    except SettingsError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 2
    print("octavo: all variables have allowed values")
    return 0


def documented() -> list[Variable]:
    """All variables for people, in the order of settings.py."""
    return [variable for variable in VARIABLES if not variable.internal]


def markdown_table() -> str:
    """One row a variable; `|` never occurs in the texts."""
    rows = ["| name | default | allowed | meaning |", "|---|---|---|---|"]
    for variable in documented():
        names = ", ".join(f"`{name}`" for name in (variable.name, *variable.aliases))
        default = f"`{variable.default}`" if variable.default is not None else "-"
        rows.append(f"| {names} | {default} | {_allowed(variable)} | {variable.doc} |")
    return "\n".join(rows)


def terminal_table() -> str:
    """Name and default on one line, the rest below it."""
    blocks = []
    for variable in documented():
        default = f" = {variable.default}" if variable.default is not None else ""
        aliases = f"  (also {', '.join(variable.aliases)})" if variable.aliases else ""
        blocks.append(f"{variable.name}{default}{aliases}\n    {variable.doc}\n    {_allowed(variable)}")
    return "\n".join(blocks)


def _allowed(variable: Variable) -> str:
    return variable.allowed.removeprefix("must be ").removeprefix("a ").removeprefix("one of ")
