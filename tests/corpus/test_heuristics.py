"""The heuristics stage: every label is what its definition says, on any text."""

import math
from itertools import product

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.expression import parse_expression
from maxlm.corpus.stages.heuristics import LABELS, PUBLISHED, HeuristicsStage
from tests.corpus import naive_heuristics as naive
from tests.corpus.corpora import label_texts

LABEL = HeuristicsStage().make_batch_label_fn()
TYPES = {f"heuristics.{name}": kind for name, kind in LABELS.items()}
PIECES = [
    "\n", "\n", "\n\n", "\r\n", "\r", "\x0b", "\u2028", "\x85", " ", " ", "\t", "\u3000", "\x1f",
    "the", "of", "and", "The", "word", "word", "longer", "x", "A", "don't", "l’homme", "'", "’",
    "snake_case", "1,000", "3.14", "e.g.", "U.S.", "٣", "½", ".", ".", "...", "..", "…", "!", "?",
    '"', "”", "»", ")", "]", "[", "[1]", "[٣]", "[edit]", "[Edit]", "[citation needed]", "[]",
    "#", "•", "-", "--", ",", "{", "}", "lorem ipsum", "Lorem Ipsum", "JavaScript", "javascript",
    "terms of use", "Cookie policy", "use cookies", "日本語", "。", "テスト", "ก็ดี", "한국어",
    "नमस्ते", "।", "العربية", "؟", "e\u0301", "\u0301", "می\u200cخواهم", "\u200d", "\ufeff", "😀",
    "❤️", "👍🏽", "\x00", "\U000e0101", "𝒳", "y" * 999, "y" * 1001, "a line that says "
                                                                  "some words.",
]  # fmt: skip


def label(*texts: str) -> list[dict]:
    batch = pa.RecordBatch.from_pydict({"text": pa.array(texts, pa.large_string())})
    return LABEL(batch).to_pylist()


def check(text: str) -> None:
    measured = label(text)[0]
    expected = naive.measures(text)
    assert list(measured) == list(expected)
    for name, value in expected.items():
        if value is None:
            assert measured[name] is None, name
        else:
            assert math.isclose(measured[name], value, rel_tol=1e-12), name


@given(st.lists(st.sampled_from(PIECES), max_size=60).map("".join))
@example("")
@example(" \n ")
@example("A.) b!」x. C.\n" * 4)
@example(
    "We are here. Are you? 「はい。」と言う。Dr. A. Smith is. [1]\nGood {x} \n" * 3
)
@example("a b c d e f g h i j k l. " * 9 + "a b c d e f g h i j k l")
@settings(max_examples=150, deadline=None)
def test_any_text_is_measured_as_defined(text):
    check(text)


@given(
    st.lists(
        st.sampled_from(["a", "b", "c d", "\n", "\n\n", "e f g h i", " "]), max_size=120
    )
)
@settings(max_examples=100, deadline=None)
def test_repetition_is_measured_as_defined(pieces):
    check(" ".join(pieces))
    check("".join(pieces))


def test_c4_takes_its_rules_in_their_order():
    # One line of every mixture of what its rules look for, and a line that they keep.
    parts = (
        "Lorem ipsum ",
        "JavaScript ",
        "{x} ",
        "our cookie policy ",
        "y" * 1001 + " ",
        "[12]",
    )
    for taken in product((True, False), repeat=len(parts)):
        middle = "".join(part for part, take in zip(parts, taken, strict=True) if take)
        for end in (".", "...", '"', "", " [2]", ".[2]"):
            check(f"It says {middle}{end}\nThe next line is one. And two.\n")


def test_words_and_symbols():
    text = "It's 1,000.5 e.g. snake_case (well-known)... l’homme 日本の hi!!? می\u200cخواهم ❤️ __a"
    assert naive.tokens(text) == [
        "It", "'s", "1,000.5", "e.g", ".", "snake_case", "(", "well", "-", "known", ")", "...", "l",
        "’homme", "日", "本", "の", "hi", "!!", "?", "می\u200cخواهم", "❤️", "__", "a",
    ]  # fmt: skip
    labels = label(text)[0]
    assert labels["words"] == 15
    assert labels["alphabetic_words"] == 14 / 24


def test_published_rules_keep_prose():
    prose = (
        "The committee met on Tuesday to talk about the new library. It was built with "
        "the help "
        "of the town, and most people have been happy to use it. Nobody knows that it "
        "was once a "
        "school! Would you have known? We asked the oldest people of the street, who "
        "remembered.\n"
    )
    texts = (
        prose,
        "for (i = 0; i < n; i++) { sum += x[i]; }\n" * 8,
        "buy cheap pills and save " * 60,
    )
    labels = pa.Table.from_pylist(label(*texts), pa.schema(list(LABELS.items())))
    labels = labels.rename_columns(list(TYPES))
    for rule in PUBLISHED.values():
        verdicts = parse_expression(rule, TYPES, "").evaluate(labels)
        assert verdicts.tolist() == [True, False, False]


def test_a_long_text_is_measured_up_to_a_whole_character():
    for longest, characters in ((4, 3), (5, 4), (6, 5)):
        [labels] = label_texts(HeuristicsStage(longest=longest), "ab é" + "z" * 50)
        assert labels["characters"] == characters


def test_stop_words_are_a_setting():
    stage = HeuristicsStage(stop_words=("der", "die", "und"))
    [labels] = label_texts(stage, "der Hund und die Katze und der Igel, Die")
    assert labels["stop_words"] == 3
    assert stage.fingerprint() != HeuristicsStage().fingerprint()
    with pytest.raises(MaxlmError, match="'to be' is 2 words"):
        HeuristicsStage(stop_words=("to be",)).make_batch_label_fn()
