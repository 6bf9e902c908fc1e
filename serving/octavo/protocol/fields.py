"""The kinds of request fields: how a value of JSON is checked, described and put into a JSON schema.

Pure functions of values; used by the table in `native`. A refused value raises `InvalidRequest` with a message that
names the field, the value or its type, and the limit. Text of a request is never echoed beyond 40 characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from octavo.protocol.errors import InvalidRequest

Schema = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of value: `parse(name, value)` checks and converts, `schema` and `allowed` describe."""

    parse: Callable[[str, object], Any]
    schema: Schema
    type_name: str
    allowed: str = ""


def type_name(value: object) -> str:
    """The JSON type of a value in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, (list, tuple)) else "an object"


def wrong_type(name: str, wanted: str, value: object) -> InvalidRequest:
    return InvalidRequest(f"{name} must be {wanted}, not {type_name(value)}", field=_root(name))


def _root(name: str) -> str:
    """The field that an element such as `messages[3].content` belongs to."""
    return name.split("[", 1)[0].split(".", 1)[0]


def _refuse(name: str, value: object, allowed: str) -> InvalidRequest:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else shown[:40] + "…"
    return InvalidRequest(f"{name} ({shown}) must be {allowed}", field=_root(name))


def flag() -> Kind:
    """true or false."""

    def parse(name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(name, "true or false", value)
        return value

    return Kind(parse, {"type": "boolean"}, "bool")


def whole(low: int, high: int) -> Kind:
    """A whole number in [low, high]; a boolean or 1.0 is none."""
    allowed = f"in [{low}, {high}]"

    def parse(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            if isinstance(value, float):
                raise _refuse(name, value, "a whole number")
            raise wrong_type(name, "a whole number", value)
        if not low <= value <= high:
            raise _refuse(name, value, allowed)
        return value

    return Kind(parse, {"type": "integer", "minimum": low, "maximum": high}, "int", allowed)


def number(low: float, high: float, *, above_low: bool = False) -> Kind:
    """A finite number in [low, high], or in (low, high]."""
    allowed = f"in {'(' if above_low else '['}{low:g}, {high:g}]"

    def parse(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise wrong_type(name, "a number", value)
        if not low <= value <= high or (above_low and value == low):  # refuses nan too
            raise _refuse(name, value, allowed)
        return float(value)

    lower = "exclusiveMinimum" if above_low else "minimum"
    return Kind(parse, {"type": "number", lower: low, "maximum": high}, "float", allowed)


def string(low: int, high: int) -> Kind:
    """A string of `low` to `high` characters."""
    allowed = f"{low} to {high} characters long"

    def parse(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        if not low <= len(value) <= high:
            raise InvalidRequest(f"{name} has {len(value)} characters and must be {allowed}", field=_root(name))
        return value

    schema = {"type": "string", "minLength": low, "maxLength": high}
    return Kind(parse, schema, "str", allowed if high < 1 << 20 else "")


def choice(*values: str) -> Kind:
    """One of some words."""
    allowed = " or ".join(values)

    def parse(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        if value not in values:
            raise _refuse(name, value, allowed)
        return value

    return Kind(parse, {"type": "string", "enum": list(values)}, "str", allowed)


def list_of(item: Kind, most: int, *, least: int = 0, or_one: bool = False) -> Kind:
    """A list of `least` to `most` items; with `or_one` a single item counts as a list of one. Becomes a tuple."""

    def parse(name: str, value: object) -> tuple[Any, ...]:
        if or_one and not isinstance(value, (list, tuple)):
            return (item.parse(name, value),)
        check_list(name, value, most, least)
        assert isinstance(value, (list, tuple))
        return tuple(item.parse(f"{name}[{index}]", entry) for index, entry in enumerate(value))

    schema: Schema = {"type": "array", "items": item.schema, "minItems": least, "maxItems": most}
    if or_one:
        schema = {"anyOf": [item.schema, schema]}
    named = f"list of {item.type_name}"
    named = f"{item.type_name} or {named}" if or_one else named
    return Kind(parse, schema, named, f"at most {most}; each {item.allowed}")


def check_list(name: str, value: object, most: int, least: int = 0) -> None:
    """Refuse what is no list of `least` to `most` entries."""
    if not isinstance(value, (list, tuple)):
        raise wrong_type(name, "a list", value)
    if len(value) > most:
        raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are allowed", field=_root(name))
    if len(value) < least:
        raise InvalidRequest(f"{name} must have at least {least} entries, not {len(value)}", field=_root(name))


def token_ids(most: int, *, least: int = 0) -> Kind:
    """A list of token ids; checked at C speed because it may hold a whole prompt. Becomes a list."""
    one = whole(0, (1 << 31) - 1)

    def parse(name: str, value: object) -> list[int]:
        check_list(name, value, most, least)
        assert isinstance(value, (list, tuple))
        plain = not value or (set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 1 << 31)
        if not plain:
            for index, entry in enumerate(value):
                one.parse(f"{name}[{index}]", entry)
        return list(value)

    schema = {"type": "array", "items": one.schema, "minItems": least, "maxItems": most}
    return Kind(parse, schema, "list of int", "token ids")


def one_or_lists(inner: Kind, most: int) -> Kind:
    """`inner`'s list, or a list of such lists (one for each choice). Becomes a tuple of lists."""

    def parse(name: str, value: object) -> tuple[list[int], ...]:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
            check_list(name, value, most)
            return tuple(inner.parse(f"{name}[{index}]", entry) for index, entry in enumerate(value))
        return (inner.parse(name, value),)

    schema = {"anyOf": [inner.schema, {"type": "array", "items": inner.schema, "maxItems": most}]}
    return Kind(parse, schema, f"{inner.type_name}, or one for each choice")


def bias_map(most: int, bound: float) -> Kind:
    """An object {"token id": bias}."""
    value_kind = number(-bound, bound)

    def parse(name: str, value: object) -> dict[int, float]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        if len(value) > most:
            raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are allowed", field=name)
        out = {}
        for key, bias in value.items():
            text = str(key)
            if not (text.isascii() and text.isdigit() and len(text) <= 10):
                raise _refuse(name, text, "an object whose keys are token ids")
            out[int(text)] = value_kind.parse(f"{name}[{text}]", bias)
        return out

    schema = {"type": "object", "additionalProperties": value_kind.schema, "maxProperties": most}
    return Kind(parse, schema, "object", f"at most {most}; each {value_kind.allowed}")


def scalar_map(most: int) -> Kind:
    """An object of strings, finite numbers and booleans."""

    def parse(name: str, value: object) -> dict[str, str | int | float | bool]:
        if not isinstance(value, dict):
            raise wrong_type(name, "an object", value)
        if len(value) > most:
            raise InvalidRequest(f"{name} has {len(value)} entries; at most {most} are allowed", field=name)
        out: dict[str, str | int | float | bool] = {}
        for key, entry in value.items():
            if isinstance(entry, float) and not math.isfinite(entry):
                raise _refuse(name, entry, "an object of finite values")
            if not isinstance(entry, (str, int, float, bool)) or len(str(key)) > 64:
                raise wrong_type(f"{name}[{str(key)[:64]}]", "a string, number or boolean", entry)
            out[str(key)] = entry
        return out

    scalar = {"type": ["string", "number", "boolean"]}
    schema = {"type": "object", "additionalProperties": scalar, "maxProperties": most}
    return Kind(parse, schema, "object", f"at most {most} scalars")
