"""What stops a start: one line for the user and an exit code. Used by node, the start and the stop command."""

from __future__ import annotations

EXIT_FAILED = 1  # something died or never became ready
EXIT_BAD_SETTINGS = 2  # a variable or the model is wrong
EXIT_PORT_IN_USE = 3
EXIT_ALREADY_RUNNING = 4


class NodeError(Exception):
    """The server cannot run. The message is one line that a user can act on."""

    def __init__(self, message: str, *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def error_line(message: object) -> str:
    """The one form in which every command shows an error."""
    return f"octavo: error: {message}"
