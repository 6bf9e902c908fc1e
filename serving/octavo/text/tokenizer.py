"""The model's tokenizer: tokenizer.json through the tokenizers library, and what the files beside it say.

Read once, from a local folder only. `encode` may be called from one thread while others detokenise; it lets other
threads run. Knows nothing of requests: limits and dialects are the front end's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Library

from octavo.protocol.errors import InvalidRequest
from octavo.text import injection
from octavo.text.chat_template import ChatTemplate, Messages
from octavo.text.detokenizer import Detokenizer, Pieces

SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """The model folder has no tokenizer that can be read; the message is one line."""


class Tokenizer:
    """Encoding, decoding, end tokens, sampling defaults and the chat template of one model folder."""

    def __init__(self, library: Library, *, config: Mapping[str, Any] | None = None,
                 generation_config: Mapping[str, Any] | None = None, chat_template: str | None = None) -> None:
        """`config` is tokenizer_config.json. Raises ValueError if the chat template does not compile."""
        config, generation_config = config or {}, generation_config or {}
        library.no_truncation()
        library.no_padding()
        self._library = library
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.pieces = Pieces(
            json.loads(library.to_str()).get("decoder"), token_of=library.id_to_token, skip=self.special_ids,
            decode=self.decode,
        )
        self.special_tokens = _named_tokens(config)
        self.eos_ids = self._find_eos(generation_config)
        self.defaults = {name: generation_config[name] for name in SAMPLING_DEFAULTS
                         if isinstance(generation_config.get(name), (int, float))}
        source = chat_template or _default_template(config.get("chat_template"))
        self.chat_template = ChatTemplate(source, self.special_tokens) if source else None
        self._control = injection.pattern_of(token.content for token in added.values() if token.special)
        self._plain = self._plain_words() if source else {}

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a model folder. Raises TokenizerError."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(f"{folder} has no tokenizer.json")
        try:
            library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: {str(error)[:200]}") from None
        try:
            config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
            return cls(
                library,
                config=config,
                generation_config=_read_json(folder / "generation_config.json"),
                chat_template=_template_file(folder),
            )
        except (ValueError, OSError) as error:
            raise TokenizerError(f"{folder}: {' '.join(str(error).split())[:200]}") from None

    @property
    def vocab_size(self) -> int:
        """Ids that mean something: 0 .. vocab_size-1."""
        return self._library.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; with `add_special_tokens` what the model puts around a plain text (BOS)."""
        # The batch call, unlike `encode`, does not keep other threads from running.
        return self._library.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_chat(self, messages: Messages, *, add_generation_prompt: bool = True,
                    continue_final_message: bool = False, variables: Mapping[str, Any] | None = None
                    ) -> tuple[str, list[int]]:
        """The prompt that the chat template makes of messages, and its token ids. Control tokens are the template's
        alone: in a message they are plain text. Raises InvalidRequest; needs a chat template.
        """
        assert self.chat_template is not None
        mark = ""
        if self._control is not None:
            try:
                messages, variables, mark = injection.mark_all(messages, variables or {}, self._control)
            except ValueError as error:
                raise InvalidRequest(str(error), field="messages") from None
        text = self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
            variables=variables,
        )
        if not mark:
            return text, self.encode(text)
        text, starts = injection.unmarked(text, mark)
        encoded = self._library.encode_batch([text], add_special_tokens=False)[0]
        return text, injection.plain_ids(encoded.ids, encoded.offsets, starts, self._plain)

    def _plain_words(self) -> dict[int, list[int]]:
        """The token ids of each control word when it is no control word."""
        self._library.encode_special_tokens = True
        try:
            return {token_id: self.encode(self._library.id_to_token(token_id) or "") for token_id in self.special_ids}
        finally:
            self._library.encode_special_tokens = False

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens skipped."""
        return self._library.decode(token_ids, skip_special_tokens=True)

    def token_strings(self, token_ids: list[int]) -> list[str]:
        """The vocabulary's own names of tokens; empty for ids without one."""
        return [self._library.id_to_token(token_id) or "" for token_id in token_ids]

    def text_of(self, token_id: int) -> str:
        """A token by itself, as logprobs show it."""
        return self.pieces.text_of(token_id)

    def new_detokenizer(self, *, continues_text: bool = False) -> Detokenizer:
        """`continues_text`: the output goes on from a plain prompt, so a leading space belongs to it."""
        return self.pieces.new_detokenizer(continues_text=continues_text)

    def _find_eos(self, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
        given = generation_config.get("eos_token_id")
        ids = set(given if isinstance(given, list) else [given])
        ids.add(self._library.token_to_id(str(self.special_tokens.get("eos_token", ""))))
        return tuple(sorted(token_id for token_id in ids if isinstance(token_id, int)))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return value


def _template_file(folder: Path) -> str | None:
    """A template in a file of its own goes before the one in tokenizer_config.json."""
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    return _default_template(_read_json(folder / "chat_template.json").get("chat_template"))


def _default_template(given: object) -> str | None:
    """A template as a string, or the one named default in a list of {name, template}."""
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _named_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    """bos_token and its like as strings; the files write them as strings or as {"content": …}."""
    found: dict[str, Any] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[name] = value
    more = config.get("additional_special_tokens")
    if isinstance(more, list):
        named = [entry.get("content") if isinstance(entry, dict) else entry for entry in more]
        found["additional_special_tokens"] = [entry for entry in named if isinstance(entry, str)]
    return found
