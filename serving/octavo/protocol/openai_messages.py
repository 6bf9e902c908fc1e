"""Chat messages of the OpenAI dialect: checked, and brought to the plain form the chat template takes.

Pure. Text only: content as a string or as text parts; images, audio, files and tool calls are refused by name. The
order of roles is the template's business.
"""

from __future__ import annotations

from octavo.protocol.errors import InvalidRequest
from octavo.protocol.fields import type_name

MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_NAME = 256
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
NOT_SERVED = ("tool_calls", "function_call", "audio")

MESSAGES_SCHEMA: dict[str, object] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"type": "string", "enum": list(ROLES)},
            "name": {"type": "string", "maxLength": MAX_NAME},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
                        },
                    },
                ]
            },
        },
    },
}


def chat_messages(messages: object) -> list[dict[str, str]]:
    """Messages as role and text. Raises InvalidRequest that names the message at fault."""
    if messages is None:
        raise InvalidRequest("messages is required", field="messages")
    if not isinstance(messages, list):
        raise _refuse("messages", f"must be a list, not {type_name(messages)}")
    if not 1 <= len(messages) <= MAX_MESSAGES:
        raise _refuse("messages", f"has {len(messages)} entries; 1 to {MAX_MESSAGES} are allowed")
    return [_message(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _refuse(name: str, message: str) -> InvalidRequest:
    return InvalidRequest(f"{name} {message}", field=name)


def _message(name: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise _refuse(name, f"must be an object, not {type_name(message)}")
    for key in NOT_SERVED:
        if message.get(key):
            raise InvalidRequest(f"{name}.{key} is not served", field=f"{name}.{key}", code="unsupported_parameter")
    role = message.get("role")
    if role in ("tool", "function"):
        raise InvalidRequest(f"{name}.role {role} is not served", field=f"{name}.role", code="unsupported_parameter")
    if not isinstance(role, str) or role not in ROLES:
        raise _refuse(f"{name}.role", f"must be one of {', '.join(ROLES)}")
    out = {"role": ROLES[role], "content": _content(f"{name}.content", message.get("content"), role)}
    author = message.get("name")
    if author is not None:
        if not isinstance(author, str) or len(author) > MAX_NAME:
            raise _refuse(f"{name}.name", f"must be a string of at most {MAX_NAME} characters")
        out["name"] = author
    return out


def _content(name: str, content: object, role: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, list):
        raise _refuse(name, f"must be a string or a list of text parts, not {type_name(content)}")
    if len(content) > MAX_PARTS:
        raise _refuse(name, f"has {len(content)} parts; at most {MAX_PARTS} are allowed")
    return "".join(_part(f"{name}[{at}]", part) for at, part in enumerate(content))


def _part(name: str, part: object) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _refuse(name, f"must be an object, not {type_name(part)}")
    kind = part.get("type")
    if kind != "text":
        shown = kind[:32] if isinstance(kind, str) else type_name(kind)
        message = f"{name}.type {shown} is not served, only text is"
        raise InvalidRequest(message, field=f"{name}.type", code="unsupported_parameter")
    text = part.get("text")
    if not isinstance(text, str):
        raise _refuse(f"{name}.text", f"must be a string, not {type_name(text)}")
    return text
