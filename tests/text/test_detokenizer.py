"""Text as it comes equals the library's decode, for every family of decoders and every plane of Unicode."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.detokenizer import MAX_HELD_BYTES, ByteLevelDetokenizer, PieceDetokenizer, WindowDetokenizer
from octavo.text.tokenizer import Tokenizer
from text.vocabularies import byte_level, metaspace, sentencepiece, wordpiece

FAMILIES = {
    "byte_level": Tokenizer(byte_level()),
    "strip": Tokenizer(sentencepiece()),
    "no_strip": Tokenizer(sentencepiece(strip=False)),
    "metaspace": Tokenizer(metaspace()),
}
EXPECTED = {"byte_level": ByteLevelDetokenizer, "strip": PieceDetokenizer, "no_strip": PieceDetokenizer,
            "metaspace": PieceDetokenizer}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.new_detokenizer()
    return [*(detokenizer.feed(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_recognised(family: str) -> None:
    assert type(FAMILIES[family].new_detokenizer()) is EXPECTED[family]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=ANY_TEXT)
def test_join_equals_decode_for_text_of_every_plane(family: str, text: str) -> None:
    tokenizer = FAMILIES[family]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_join_equals_decode_for_any_ids(family: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[family]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=MAX_HELD_BYTES))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_text_after_k_tokens_depends_on_those_alone(family: str, data: st.DataObject) -> None:
    tokenizer = FAMILIES[family]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    cut = data.draw(st.integers(0, len(ids)))
    whole, part = stream(tokenizer, ids)[:-1], stream(tokenizer, ids[:cut])[:-1]
    assert whole[:cut] == part
    assert tokenizer.decode(ids).startswith("".join(part))


@given(text=ANY_TEXT)
def test_no_split_character_is_released(text: str) -> None:
    tokenizer = FAMILIES["byte_level"]
    assert not any("\ufffd" in part for part in stream(tokenizer, tokenizer.encode(text.replace("\ufffd", ""))))


def byte_ids(tokenizer: Tokenizer, raw: bytes) -> list[int]:
    token_id = tokenizer._library.token_to_id
    return [token_id(f"<0x{byte:02X}>") for byte in raw]


def test_a_run_of_bytes_waits_for_its_end() -> None:
    tokenizer = FAMILIES["no_strip"]
    assert stream(tokenizer, byte_ids(tokenizer, "🙂".encode())) == ["", "", "", "", "🙂"]


def test_a_broken_run_is_one_replacement_a_byte() -> None:
    tokenizer = FAMILIES["no_strip"]
    ids = byte_ids(tokenizer, "🙂".encode() + b"\xff")
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "\ufffd" * 5


def test_a_very_long_run_is_not_held_to_its_end() -> None:
    tokenizer = FAMILIES["no_strip"]
    text = "丂" * 60
    parts = stream(tokenizer, byte_ids(tokenizer, text.encode()))
    assert "".join(parts) == text
    assert len("".join(parts[:-1])) == 60


@settings(max_examples=50)
@given(words=st.lists(st.sampled_from(["hello", "world", "fox", "tiny", ",", "lazy", "unknownword"]), max_size=60))
def test_other_decoders_follow_the_library(words: list[str]) -> None:
    tokenizer = Tokenizer(wordpiece())
    assert isinstance(tokenizer.new_detokenizer(), WindowDetokenizer)
    ids = tokenizer.encode(" ".join(words))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_output_that_continues_a_text_keeps_its_space() -> None:
    tokenizer = FAMILIES["strip"]
    ids = tokenizer.encode("world")
    assert tokenizer.decode(ids) == "world"
    detokenizer = tokenizer.new_detokenizer(continues_text=True)
    assert "".join([*map(detokenizer.feed, ids), detokenizer.flush()]) == " world"


def test_single_tokens_have_a_text_of_their_own() -> None:
    tokenizer = FAMILIES["byte_level"]
    special = tokenizer._library.token_to_id("<|im_end|>")
    assert tokenizer.text_of(special) == "<|im_end|>"
    assert tokenizer.text_of(tokenizer.encode("é")[0]) in ("é", "\ufffd")
