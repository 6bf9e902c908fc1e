"""What can be wrong with a model folder. Imports nothing, so that processes without torch can report it too."""

from __future__ import annotations

MAX_CHARACTERS = 600


class CheckpointError(ValueError):
    """A model folder cannot be served: missing, malformed or not supported. The message is one line for the user.

    Names in it come from files that anybody may have made: control characters become spaces, endless ones are cut.
    """

    def __init__(self, message: str) -> None:
        line = "".join(character if character.isprintable() else " " for character in message)
        super().__init__(line if len(line) <= MAX_CHARACTERS else f"{line[:MAX_CHARACTERS]} …")
