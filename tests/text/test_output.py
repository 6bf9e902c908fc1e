"""What may be sent when: split characters, stop strings, min tokens, replay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.text.output import OutputText
from octavo.text.stop import StopMatcher, StopStrings
from octavo.text.tokenizer import Tokenizer
from text.vocabularies import byte_level

TOKENIZER = Tokenizer(byte_level())
LETTERS = {letter: TOKENIZER.encode(letter)[0] for letter in "abcdxyz "}


def ids_of(text: str) -> list[int]:
    """One token a letter."""
    return [LETTERS[letter] for letter in text]


def output(*stops: str, min_tokens: int = 1) -> OutputText:
    given_stops = StopStrings(stops) if stops else None
    return OutputText(TOKENIZER.new_detokenizer(), stops=given_stops, min_tokens=min_tokens)


def run(out: OutputText, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Take after every token, then finish."""
    messages = []
    for token_id in ids:
        over = out.feed(token_id)
        if over or out.has_free:
            messages.append(out.take()[:2])
        if over:
            return messages
    out.finish()
    messages.append(out.take()[:2])
    return messages


def test_without_stops_each_token_leaves_at_once() -> None:
    assert run(output(), ids_of("abc")) == [("a", ids_of("a")), ("b", ids_of("b")), ("c", ids_of("c")), ("", [])]


def test_a_split_character_keeps_its_tokens_together() -> None:
    raw = [TOKENIZER._library.token_to_id(name) for name in ("Ã", "©")]  # the two bytes of é
    assert run(output(), [*raw, LETTERS["a"]]) == [("é", raw), ("a", ids_of("a")), ("", [])]


def test_a_possible_stop_string_is_held_and_released() -> None:
    messages = run(output("abx"), ids_of("cabd"))
    assert messages == [("c", ids_of("c")), ("abd", ids_of("abd")), ("", [])]


def test_a_stop_string_over_tokens_is_cut_with_its_tokens() -> None:
    out = output("abx")
    assert run(out, ids_of("cabxyz")) == [("c", ids_of("c")), ("", [])]
    assert out.stopped_by == "abx"
    assert (out.text, out.token_ids, out.num_sampled) == ("c", ids_of("c"), 4)


def test_a_token_that_begins_before_the_stop_string_stays() -> None:
    (two_words,) = TOKENIZER.encode("two words")
    out = output("words")
    out.feed(LETTERS["a"])
    assert out.feed(two_words)
    assert out.take()[:2] == ("atwo ", [LETTERS["a"], two_words])
    assert out.stopped_by == "words"


def test_held_text_leaves_at_the_end() -> None:
    out = output("abcd")
    assert run(out, ids_of("xab")) == [("x", ids_of("x")), ("ab", ids_of("ab"))]
    assert out.stopped_by is None


def test_a_repeated_beginning_is_not_held_for_ever() -> None:
    messages = run(output("aab"), ids_of("aaaaaa"))
    assert [len(ids) for _, ids in messages] == [1, 1, 1, 1, 2]


def test_no_stop_before_min_tokens() -> None:
    out = output("b", min_tokens=3)
    run(out, ids_of("abxabx"))
    assert (out.text, out.num_sampled) == ("abxa", 5)


def test_the_first_completed_match_wins_and_the_longest_of_those() -> None:
    out = output("bcd", "abcd", "cx")
    run(out, ids_of("zabcdx"))
    assert (out.text, out.stopped_by) == ("z", "abcd")
    out = output("abcd", "bc")
    run(out, ids_of("zabcd"))
    assert (out.text, out.stopped_by) == ("za", "bc")


def first_completed(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The slow, obviously right version."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return end, max(hits, key=len)
    return None


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)


@given(text=st.text("abc", max_size=20), stops=STOPS, sizes=st.lists(st.integers(1, 4), min_size=20, max_size=20))
def test_the_automaton_agrees_with_a_plain_search(text: str, stops: list[str], sizes: list[int]) -> None:
    matcher, position, found = StopMatcher(StopStrings(stops)), 0, None
    for size in sizes:
        part = text[position : position + size]
        found = matcher.feed(part)
        if found is not None:
            found = position + found[0], found[1]
            break
        held = matcher.num_held
        seen = text[: position + len(part)]
        assert held == max((k for k in range(5) if k <= len(seen) and any(
            stop.startswith(seen[len(seen) - k :]) for stop in stops)), default=0)
        position += size
    whole = first_completed(text[: sum(sizes)], stops)
    assert found == whole


@given(text=st.text("abcd xyz", max_size=25), stops=STOPS, cut=st.integers(0, 25), every=st.integers(1, 5))
def test_when_it_is_taken_changes_nothing(text: str, stops: list[str], cut: int, every: int) -> None:
    ids = ids_of(text)
    one, other = output(*stops), output(*stops)
    messages = run(one, ids)
    for index, token_id in enumerate(ids):
        if other.feed(token_id):
            break
        if index % every == 0:
            other.take()
    other.finish()
    other.take()
    assert (one.text, one.token_ids, one.stopped_by) == (other.text, other.token_ids, other.stopped_by)
    assert "".join(text for text, _ in messages) == one.text
    assert [i for _, ids in messages for i in ids] == one.token_ids


@given(text=st.text("abcd xyz", max_size=25), stops=STOPS, after=st.integers(0, 30))
def test_replay_goes_on_where_the_messages_stopped(text: str, stops: list[str], after: int) -> None:
    ids = ids_of(text)
    whole = output(*stops)
    messages = run(whole, ids)
    seen = messages[:after]
    held = [token_id for _, part in seen for token_id in part]
    resumed = output(*stops)
    assert not resumed.replay(held)
    if after < len(messages):
        rest = run(resumed, ids[len(held) :])
        assert "".join(t for t, _ in seen) + "".join(t for t, _ in rest) == whole.text
        assert resumed.text == whole.text
        assert resumed.token_ids == whole.token_ids
        assert resumed.stopped_by == whole.stopped_by


def test_replay_that_holds_a_whole_stop_string_ends_at_once() -> None:
    out = output("abx")
    assert out.replay(ids_of("cabx"))
    assert out.text == "c"


@pytest.mark.parametrize("stops", [["a" * 256], ["ab" * 100, "ba" * 100]])
def test_long_stop_strings_are_found(stops: list[str]) -> None:
    out = output(*stops)
    run(out, ids_of("x" + stops[0] + "x"))
    assert (out.text, out.stopped_by) == ("x", stops[0])


@given(st.lists(st.sampled_from([*LETTERS.values(), *(TOKENIZER._library.token_to_id(name) for name in "Ã©")])),
       st.integers(1, 5), st.sampled_from([(), ("abx",), ("b", "xy")]))
def test_pieces_join_to_the_whole_and_end_where_a_message_could(ids: list[int], limit: int, stops: tuple[str, ...]
                                                                 ) -> None:
    whole, out = output(*stops), output(*stops)
    messages = run(whole, ids)
    borders = {0}
    for _, said in messages:
        borders.add(max(borders) + len(said))
    for token_id in ids:
        if out.feed(token_id):
            break
    out.finish()
    text, taken = "", []
    while out.num_free > limit:
        part, said, first = out.take(limit)
        assert said, "each piece brings the reader on"
        assert first == len(taken)
        text, taken = text + part, taken + said
        assert len(taken) in borders
    part, said, _ = out.take(limit)
    assert (text + part, taken + said) == (whole.text, whole.token_ids)
    assert (out.text, out.num_free) == (whole.text, 0)
