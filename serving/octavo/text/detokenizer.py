"""Text from token ids, as they come: what `Tokenizer.decode` (special tokens skipped) would say, in pieces.

Pure; one detokeniser per sequence, used by the delivery thread, over one shared `Pieces` table per tokenizer. Text
released after k tokens depends on those k ids alone; the join of all pieces and of `flush` equals decoding all ids.
Three families of decoders are known: byte-level BPE, pieces with byte fallback (SentencePiece), and, for anything
else, a sliding window over the library's own decode, which follows it where that decode is local.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from typing import Any, Protocol

MAX_HELD_BYTES = 64  # of one run of byte tokens; a longer run is released character by character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Decode = Callable[[list[int]], str]


class Detokenizer(Protocol):
    """State of one sequence."""

    pending: bool  # bytes or text of earlier tokens are held back

    def feed(self, token_id: int) -> str:
        """Take one more token; the text that is now certain."""
        ...

    def flush(self) -> str:
        """The sequence has ended: the text that was held back."""
        ...


def byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: which byte each of its 256 characters stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class _Table(dict[int, "bytes | str | int | None"]):
    """The piece of each id, found when it is first asked for: one look-up a token after that.

    Byte-level: str if its bytes are whole characters, else bytes. Pieces: str, or int for a byte token. None: no text.
    """

    def __init__(self, find: Callable[[int], bytes | str | int | None]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, token_id: int) -> bytes | str | int | None:
        found = self[token_id] = self._find(token_id)
        return found


class Pieces:
    """What each token id stands for, filled as ids occur; shared by all sequences of a tokenizer."""

    def __init__(self, decoder: dict[str, Any] | None, *, token_of: Callable[[int], str | None], skip: frozenset[int],
                 decode: _Decode) -> None:
        """`decoder` is that part of tokenizer.json; ids in `skip` have no text."""
        self._token_of = token_of
        self._skip = skip
        self._decode = decode
        self._plan = _Plan(decoder)
        self._alphabet = byte_of_character()
        self.table = _Table(self._find)

    def new_detokenizer(self, *, continues_text: bool = False) -> Detokenizer:
        """`continues_text`: the output goes on from a prompt, so a leading space belongs to it."""
        if self._plan.family == "bytes":
            return ByteLevelDetokenizer(self)
        if self._plan.family == "pieces":
            return PieceDetokenizer(self, self._plan, continues_text=continues_text)
        return WindowDetokenizer(self._decode)

    def _find(self, token_id: int) -> bytes | str | int | None:
        token = None if token_id in self._skip else self._token_of(token_id)
        if token is None:
            return None
        return self._byte_level(token) if self._plan.family == "bytes" else self._plan.piece(token)

    def _byte_level(self, token: str) -> bytes | str:
        values = [self._alphabet.get(character) for character in token]
        raw = token.encode() if None in values else bytes(value for value in values if value is not None)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def text_of(self, token_id: int) -> str:
        """A token by itself, for logprobs: leading space kept, special tokens shown, broken characters as U+FFFD."""
        piece = self.table[token_id]
        if isinstance(piece, str):
            return piece
        if piece is None:
            return self._token_of(token_id) or ""
        raw = bytes([piece]) if isinstance(piece, int) else piece
        return raw.decode("utf-8", "replace")


class _Plan:
    """The decoder of tokenizer.json, reduced to one of the known families."""

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        self.replacements: list[tuple[str, str]] = []
        self.byte_fallback = False
        self.strip_left = ("", 0)  # character, how many
        self.drop_in_first = ""  # Metaspace: dropped from the first token
        self._fused = False
        steps = decoder.get("decoders", []) if decoder and decoder.get("type") == "Sequence" else [decoder]
        if len(steps) == 1 and steps[0] and steps[0].get("type") == "ByteLevel":
            self.family = "bytes"
        else:
            self.family = "pieces" if steps and all(step and self._take(step) for step in steps) else "window"

    def _take(self, step: dict[str, Any]) -> bool:
        kind = step.get("type")
        if kind == "Fuse":
            self._fused = True
        elif kind == "Strip":
            self.strip_left = (step["content"], step["start"])
            return self._fused and step.get("stop", 0) == 0
        elif self._fused:
            return False
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Replace" and "String" in step.get("pattern", {}) and not self.byte_fallback:
            self.replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and not self.replacements and not self.byte_fallback:
            if step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True):
                self.drop_in_first = step["replacement"]
            self.replacements.append((step["replacement"], " "))
        else:
            return False
        return True

    def piece(self, token: str) -> str | int:
        for old, new in self.replacements:
            token = token.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        return int(match[1], 16) if match else token


class ByteLevelDetokenizer:
    """All tokens are bytes of one UTF-8 text; what is malformed becomes U+FFFD."""

    def __init__(self, pieces: Pieces) -> None:
        self._table = pieces.table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.pending = False

    def feed(self, token_id: int) -> str:
        piece = self._table[token_id]
        if isinstance(piece, str):
            if not self.pending:
                return piece
            piece = piece.encode()
        if piece is None:
            return ""
        assert isinstance(piece, bytes)
        text = self._utf8.decode(piece)
        self.pending = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        self.pending = False
        return self._utf8.decode(b"", True)


class PieceDetokenizer:
    """Tokens are strings or single bytes. A run of bytes is text if all of it is UTF-8, else one U+FFFD a byte.

    So a run is held back until it ends, or until it is longer than MAX_HELD_BYTES.
    """

    def __init__(self, pieces: Pieces, plan: _Plan, *, continues_text: bool) -> None:
        self._table = pieces.table
        self._run = bytearray()
        self._long_run: codecs.IncrementalDecoder | None = None
        self._strip, self._num_strip = plan.strip_left
        self._drop_in_first = plan.drop_in_first
        if continues_text:
            self._num_strip, self._drop_in_first = 0, ""
        self.pending = False

    def feed(self, token_id: int) -> str:
        piece = self._table[token_id]
        if piece is None:
            return ""
        if isinstance(piece, int):
            self._drop_in_first = ""
            return self._stripped(self._feed_byte(piece))
        assert isinstance(piece, str)
        if self._drop_in_first:
            piece, self._drop_in_first = piece.replace(" ", ""), ""
        if self._run or self._long_run is not None or self._num_strip:
            return self._stripped(self._end_run() + piece)
        return piece

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _feed_byte(self, byte: int) -> str:
        self.pending = True
        if self._long_run is None:
            self._run.append(byte)
            if len(self._run) <= MAX_HELD_BYTES:
                return ""
            self._long_run = codecs.getincrementaldecoder("utf-8")("replace")
            text = self._long_run.decode(bytes(self._run))
            self._run.clear()
        else:
            text = self._long_run.decode(bytes([byte]))
        self.pending = bool(self._long_run.getstate()[0])
        return text

    def _end_run(self) -> str:
        run, self._run, self.pending = self._run, bytearray(), False
        if self._long_run is not None:
            long_run, self._long_run = self._long_run, None
            return long_run.decode(b"", True)
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        """Drop up to `_num_strip` characters from the beginning of the whole text."""
        while text and self._num_strip:
            if text[0] != self._strip:
                self._num_strip = 0
            else:
                text = text[1:]
                self._num_strip -= 1
        return text


def _common_length(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    if other.startswith(one):
        return len(one)
    return next(index for index, (a, b) in enumerate(zip(one + "\0", other + "\1")) if a != b)


class WindowDetokenizer:
    """Any other decoder: compares the library's decode of the last tokens with and without the newest one."""

    WINDOW = 32

    def __init__(self, decode: _Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._text = ""  # of the window
        self._num_out = 0  # characters of it that were released
        self.pending = False

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        before, self._text = self._text, self._decode(self._ids)
        end = _common_length(before, self._text)
        out = self._text[self._num_out : end]
        self._num_out = max(self._num_out, end)
        self.pending = self._num_out < len(self._text)
        if len(self._ids) > self.WINDOW:
            self._slide()
        return out

    def _slide(self) -> None:
        ids = self._ids[self.WINDOW // 2 :]
        text = self._decode(ids)
        gone = len(self._text) - len(text)
        if self._text.endswith(text) and self._num_out >= gone:
            self._ids, self._text, self._num_out = ids, text, self._num_out - gone

    def flush(self) -> str:
        out, self._num_out, self.pending = self._text[self._num_out :], len(self._text), False
        return out
