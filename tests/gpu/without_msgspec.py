"""What the engine needs of msgspec, for a machine that has torch and a card but not msgspec: classes, no wire.

The engine inside one process passes messages as objects and encodes nothing. `provide` must run before the first import
of octavo's messages. Where msgspec is installed it does nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NO_WIRE = "this is a stand-in for msgspec: it has classes, and nothing that encodes them"


class Struct:
    """A base whose subclasses are dataclasses, with msgspec's options accepted and its copied defaults."""

    def __init_subclass__(cls, *, frozen: bool = False, **_: object) -> None:
        """The other options are about the wire."""
        for name, default in list(vars(cls).items()):
            if isinstance(default, (dict, list)) and not name.startswith("__"):
                setattr(cls, name, dataclasses.field(default_factory=default.copy))
        dataclasses.dataclass(frozen=frozen)(cls)


class NoWire:
    """In place of an encoder or decoder."""

    def __init__(self, *_: object) -> None:
        raise NotImplementedError(NO_WIRE)


def stand_in() -> ModuleType:
    """A module with the names that octavo uses."""
    module = ModuleType("msgspec", NO_WIRE)
    module.__spec__ = ModuleSpec("msgspec", None, is_package=True)
    module.__path__ = []
    parts: dict[str, dict[str, Any]] = {
        "structs": {"replace": dataclasses.replace},
        "msgpack": {"Encoder": NoWire, "Decoder": NoWire},
        "json": {"Encoder": NoWire, "Decoder": NoWire},
    }
    for name, members in parts.items():
        part = ModuleType(f"msgspec.{name}")
        vars(part).update(members)
        setattr(module, name, part)
    vars(module).update(Struct=Struct, DecodeError=ValueError, ValidationError=ValueError)
    return module


def provide() -> None:
    """Put the stand-in where `import msgspec` finds it, if there is no msgspec."""
    if "msgspec" not in sys.modules and importlib.util.find_spec("msgspec") is None:
        module = stand_in()
        parts = {f"msgspec.{name}": part for name, part in vars(module).items() if isinstance(part, ModuleType)}
        sys.modules |= {"msgspec": module, **parts}  # the parts as well: `from msgspec.structs import replace`
