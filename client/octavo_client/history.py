"""A conversation that grows turn by turn."""

from __future__ import annotations


class ChatHistory:
    """Messages of a chat, ready to be sent.

    history = ChatHistory(system="You are brief.")
    history.user("Hello"); answer = client.generate(history); history.assistant(answer.text)
    """

    def __init__(self, *, system: str | None = None) -> None:
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def user(self, text: str) -> ChatHistory:
        """Add what the user says."""
        self.messages.append({"role": "user", "content": text})
        return self

    def assistant(self, text: str) -> ChatHistory:
        """Add what the model answered."""
        self.messages.append({"role": "assistant", "content": text})
        return self

    def undo(self) -> None:
        """Take the last turn back: everything from the last user message on."""
        while self.messages and self.messages[-1]["role"] != "system":
            if self.messages.pop()["role"] == "user":
                return

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
