"""What can be wrong with a model folder. Imports nothing, so that processes without torch can report it too."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model folder cannot be served: missing, malformed or not supported. The message is one line for the user."""
