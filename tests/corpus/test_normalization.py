"""Normalization is Python's own, but for runs of marks that no language has."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.corpus.stages.exact import ExactStage
from maxlm.corpus.text import normalize
from maxlm.corpus.words import WordsConfig, open_lines

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
MARKS = "\u0301\u0323\u0334\u0f73\uff9e"
pieces = st.lists(st.sampled_from(["a", "é", "한", " ", *MARKS, *(mark * 14 for mark in MARKS)]))


@given(pieces.map("".join), st.sampled_from(FORMS))
def test_only_runs_of_more_than_30_marks_are_changed(text, form):
    plain, found = unicodedata.normalize(form, text), normalize(form, text)
    if re.search(f"[{MARKS}]{{31}}", text):
        assert sorted(unicodedata.normalize("NFD", found).replace("\u034f", "")) == sorted(
            unicodedata.normalize("NFD", plain)
        )
        assert not re.search("[\u0301\u0323\u0334\u0f71\u0f72\u3099]{64}", found)
    else:
        assert found == plain


@pytest.mark.timeout(120)
def test_a_long_run_of_marks_takes_time_in_proportion():
    text = "a" + "\u0301\u0323" * 300_000
    assert ExactStage().normalise(text).startswith("\u1ea1\u0323")
    for accents in (True, False):
        assert len(list(open_lines(WordsConfig(accents=accents))(text))) == 1
