"""Stop strings: found at the first token after which the text contains one, wherever token borders lie."""

from __future__ import annotations

import codecs
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sageLLM.runtime.worker.stop_strings import StopStringMatcher


class FakeDecoder:
    """Tokens are indices into pieces of bytes; incomplete UTF-8 is held back."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: list[int]) -> str:
        return "".join(self._utf8.decode(self._pieces[i]) for i in ids)


def matcher(pieces: list[str | bytes], stop: list[str], min_tokens: int = 0) -> StopStringMatcher:
    encoded = [p.encode() if isinstance(p, str) else p for p in pieces]
    return StopStringMatcher(FakeDecoder(encoded), stop, min_tokens)


def test_a_stop_inside_one_token():
    assert matcher(["Hello", " END now", "x"], ["END"]).push([0, 1, 2]) == (1, "END")


def test_a_stop_across_tokens_and_pushes():
    watch = matcher(["a\n", "\nQ", "uestion:"], ["\n\nQuestion:"])
    assert watch.push([0]) is None
    assert watch.push([1]) is None
    assert watch.push([2]) == (0, "\n\nQuestion:")


def test_a_character_split_over_tokens_counts_when_it_is_whole():
    pieces = ["€".encode()[:1], "€".encode()[1:2], "€".encode()[2:]]
    assert matcher(pieces, ["€"]).push([0, 1, 2]) == (2, "€")


def test_of_several_the_one_that_begins_first():
    assert matcher(["xabcy"], ["bc", "abc", "y"]).push([0]) == (0, "abc")
    assert matcher(["xabcy"], ["ab", "abc"]).push([0]) == (0, "ab")


def test_before_min_tokens_a_stop_does_not_count_and_is_not_found_later():
    assert matcher(["END", "a", "b", "END"], ["END"], min_tokens=3).push([0, 1, 2, 3]) == (3, "END")
    assert matcher(["EN", "D"], ["END"], min_tokens=2).push([0, 1]) == (1, "END")


@pytest.mark.parametrize("stop", [[], [""], ["a", ""]])
def test_no_stop_string_is_an_error(stop):
    with pytest.raises(ValueError, match="at least one"):
        matcher(["a"], stop)


def naive(pieces: list[bytes], stop: list[str], min_tokens: int) -> tuple[int, str] | None:
    """Search the whole text after every token."""
    text = ""
    decoder = FakeDecoder(pieces)
    for index in range(len(pieces)):
        old = len(text)
        text += decoder.push([index])
        if index + 1 < min_tokens:
            continue
        found = [
            (start, order, s)
            for order, s in enumerate(stop)
            for start in range(len(text) - len(s) + 1)
            if text.startswith(s, start) and start + len(s) > old
        ]
        if found:
            return index, min(found)[2]
    return None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab€\n", max_size=40),
    cuts=st.lists(st.integers(0, 120), max_size=30),
    stop=st.lists(st.text("ab€\n", min_size=1, max_size=5), min_size=1, max_size=4),
    min_tokens=st.integers(0, 6),
    chunk=st.integers(1, 4),
)
def test_equals_a_naive_search(text, cuts, stop, min_tokens, chunk):
    raw = text.encode()
    borders = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(borders)]
    watch = matcher(pieces, stop, min_tokens)
    found = None
    for start in range(0, len(pieces), chunk):
        hit = watch.push(list(range(start, min(start + chunk, len(pieces)))))
        if hit is not None:
            found = (start + hit[0], hit[1])
            break
    assert found == naive(pieces, stop, min_tokens)
