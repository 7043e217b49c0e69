"""Spans are cut as asked, and what remains reads as before."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.corpus.cuts import remove_spans


def cut_marked(marked: str) -> str:
    """What remains of a text whose spans stand between brackets."""
    spans = []
    text = ""
    for part in re.split(r"(\[|\])", marked):
        if part == "[":
            spans.append((len(text), -1))
        elif part == "]":
            spans[-1] = (spans[-1][0], len(text))
        else:
            text += part
    return remove_spans(text, spans)


@pytest.mark.parametrize(
    ("marked", "left"),
    [
        ("one [two] three", "one three"),
        ("[one] two", "two"),
        ("one [two]", "one"),
        ("[one two]", ""),
        (" [one]\n", ""),
        ("one\n\n[two]\n\nthree\n", "one\n\nthree\n"),
        ("one\n\n\n[two]\n\nthree", "one\n\n\nthree"),
        ("one [two\n\nthree] four", "one\n\nfour"),
        ("one [two] [three] four", "one four"),
        ("one[ two ]three", "one three"),
        ("one\r\n[two]\r\n\r\nthree", "one\r\n\r\nthree"),
        ("if a:\n    [b()]\n    c()", "if a:\n    c()"),
        ("[if a:]\n    c()", "    c()"),
        ("one\u3000[two]three", "one\u3000three"),
        ("one[two]three", "one three"),
        ("one,[two]three", "one,three"),
        ("你好[再见]世界", "你好世界"),
        ("مرحبا [بالعالم] اليوم", "مرحبا اليوم"),
        ("👩‍👩‍👧 [👨‍👩‍👦] 🏳️‍🌈", "👩‍👩‍👧 🏳️‍🌈"),
    ],
)
def test_sides_are_joined_by_the_widest_break_between_them(marked, left):
    assert cut_marked(marked) == left


def test_spans_of_several_labels_are_united():
    text = "zero one two three four five"
    spans = [(13, 18), (5, 12), (9, 13), (-3, 0), (90, 99), (24, 400), (7, 7)]
    assert remove_spans(text, spans) == "zero four"
    assert remove_spans(text, reversed(spans)) == "zero four"
    assert remove_spans(text, [(5, 18), (9, 12)]) == "zero four five"
    assert remove_spans(text, []) == text
    assert remove_spans("", [(0, 5)]) == ""


TEXTS = st.text(st.sampled_from("ab, \n\t\u2028中"), max_size=40)
SPANS = st.lists(st.tuples(st.integers(-2, 42), st.integers(-2, 42)), max_size=4)


@given(TEXTS, SPANS)
def test_what_is_visible_and_not_in_a_span_remains_and_words_stay_apart(text, spans):
    left = remove_spans(text, spans)
    gone = {i for start, end in spans for i in range(max(start, 0), end)}
    visible = [i for i, character in enumerate(text) if not character.isspace()]
    remaining = [i for i in visible if i not in gone]
    assert "".join(left.split()) == "".join(text[i] for i in remaining)
    # Two words have a break between them if they had, or if they would run together.
    places = [i for i, c in enumerate(left) if not c.isspace()]
    for at, here, after in zip(
        range(len(remaining)), remaining, remaining[1:], strict=False
    ):
        joined = places[at + 1] == places[at] + 1
        if joined:
            assert not any(character.isspace() for character in text[here:after])
        if after == here + 1:
            assert joined
        elif joined:
            assert not (text[here] in "ab" and text[after] in "ab")
