"""The n-gram models: lmplz's own, and what Chen and Goodman's formulas say."""

import tempfile
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.corpus.kneser_ney import KneserNeyConfig, estimate_kneser_ney

LMPLZ = Path(__file__).parent / "lmplz"
FALLBACK = (0.5, 1.0, 1.5)
# By lmplz of github.com/kpu/kenlm: -o ORDER [--prune ...] [--discount_fallback ...].
# Each text ends with a new word, since lmplz takes the plain count of the very last
# n-gram for its adjusted one.
MODELS = {
    "story1": ("story", {"order": 1}),
    "story2": ("story", {"order": 2, "prune": (1,), "discount_fallback": None}),
    "story3": ("story", {"order": 3, "discount_fallback": None}),
    "story3pruned": (
        "story",
        {"order": 3, "prune": (0, 0, 1), "discount_fallback": None},
    ),
    "short": ("short", {"order": 4}),
    "single": ("single", {"order": 4}),
    "words": ("words", {"order": 3, "discount_fallback": (0.4, 0.9, 0.9)}),
}


def estimate(folder, sentences, **options):
    path = folder / "model.arpa"
    config = KneserNeyConfig(**{"discount_fallback": FALLBACK, **options})
    report = estimate_kneser_ney(sentences, path, config)
    assert [p.name for p in folder.iterdir()] == ["model.arpa"]
    return path, report


def lines_of(path):
    """A line's n-gram (or what else it says), log10 of its probability, and of its
    backoff."""
    for line in path.read_text("utf-8").split("\n"):
        columns = line.split("\t")
        if len(columns) == 1:
            yield line, 0.0, 0.0
        else:
            yield (
                columns[1],
                float(columns[0]),
                float(columns[2]) if len(columns) > 2 else None,
            )


def grams_of(path):
    """(log10 of probability, of backoff) by n-gram."""
    lines = (
        line.split("\t") for line in path.read_text("utf-8").split("\n") if "\t" in line
    )
    return {
        tuple(words.split(" ")): (float(p), float(*b or [0])) for p, words, *b in lines
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_that_of_lmplz_line_by_line(name, tmp_path):
    text, options = MODELS[name]
    with (LMPLZ / f"{text}.txt").open(encoding="utf-8", newline="\n") as sentences:
        path, report = estimate(tmp_path, sentences, **options)
    theirs = list(lines_of(LMPLZ / f"{name}.arpa"))
    for ours, their in zip_longest(lines_of(path), theirs):
        assert ours[0] == their[0]
        assert ours[1:] == pytest.approx(their[1:], abs=5e-7)
    counts = [
        int(line[0].split("=")[1]) for line in theirs if line[0].startswith("ngram ")
    ]
    assert list(report.num_ngrams) == counts


class Naive:
    """Chen and Goodman's interpolated model over counts in dictionaries, word by
    word."""

    def __init__(self, sentences, order, fallback):
        count = [Counter() for _ in range(order + 1)]
        for sentence in sentences:
            words = ("<s>", *sentence.split(), "</s>")
            for k in range(1, order + 1):
                count[k].update(
                    words[i : i + k] for i in range(k == 1, len(words) - k + 1)
                )
        self.order, self.adjusted = order, [Counter(each) for each in count]
        for k in range(1, order):
            left = Counter(gram[1:] for gram in count[k + 1])
            self.adjusted[k] = Counter(
                {g: c if g[0] == "<s>" else left[g] for g, c in count[k].items()}
            )
        self.words = {gram[0] for gram in count[1]} | {"<unk>"}
        self.discounts = [[0.0] * 4] + [
            self._discounts(k, fallback) for k in range(1, order + 1)
        ]

    def _discounts(self, k, fallback):
        n = Counter(self.adjusted[k].values())
        if not (n[1] and n[2] and n[3]):
            return [0.0, *fallback]
        y = n[1] / (n[1] + 2 * n[2])
        found = [0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))]
        return found if all(0 <= found[j] <= j for j in (1, 2, 3)) else [0.0, *fallback]

    def discount(self, k, count):
        return self.discounts[k][min(count, 3)]

    def backoff(self, context):
        k = len(context) + 1
        seen = [c for gram, c in self.adjusted[k].items() if gram[:-1] == context]
        return sum(self.discount(k, c) for c in seen) / sum(seen) if seen else 1.0

    def probability(self, gram):
        k = len(gram)
        if k == 0:
            return 1 / len(self.words)
        total = sum(
            c for other, c in self.adjusted[k].items() if other[:-1] == gram[:-1]
        )
        lower = self.probability(gram[1:])
        if not total:
            return lower
        count = self.adjusted[k][gram]
        return (count - self.discount(k, count)) / total + self.backoff(
            gram[:-1]
        ) * lower


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from("abcdé"), max_size=7).map(" ".join),
        min_size=1,
        max_size=30,
    ),
    st.integers(1, 6),
    st.sampled_from([FALLBACK, (0.2, 0.3, 3.0), (1.0, 2.0, 3.0)]),
)
def test_probabilities_and_backoffs_are_those_of_the_formulas(
    sentences, order, fallback
):
    assume(any(sentences))
    naive = Naive(sentences, order, fallback)
    with tempfile.TemporaryDirectory() as folder:
        path, _ = estimate(
            Path(folder), sentences, order=order, discount_fallback=fallback
        )
        found = grams_of(path)
    seen = {gram for counts in naive.adjusted for gram in counts}
    assert found.keys() == seen | {("<unk>",), ("<s>",)}
    for gram in seen | {("<unk>",)}:
        probability, backoff = found[gram]
        assert 10**probability == pytest.approx(naive.probability(gram), abs=1e-6)
        if len(gram) < order:
            assert 10**backoff == pytest.approx(naive.backoff(gram), abs=1e-6)


def test_the_end_of_a_sentence_is_never_pruned(tmp_path):
    path, report = estimate(tmp_path, ["a b a b a b c"], order=2, prune=(1,))
    assert {g for g in grams_of(path) if len(g) == 1} == {
        (w,) for w in ("<unk>", "<s>", "</s>", "a", "b")
    }
    assert report.num_ngrams[0] == 5


def test_special_words_in_a_text_are_white_space(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    plain, _ = estimate(tmp_path / "a", ["a b", "", "<b c>"])
    special, _ = estimate(tmp_path / "b", ["a <s> b </s>", "<unk>", "<s> <b\0c>\n"])
    assert plain.read_bytes() == special.read_bytes()


@pytest.mark.parametrize("sentences", [[], ["", " \t ", "<s>"]])
def test_no_words_are_an_error(sentences, tmp_path):
    with pytest.raises(MaxlmError, match="no words"):
        estimate_kneser_ney(sentences, tmp_path / "model.arpa", KneserNeyConfig())
    assert not list(tmp_path.iterdir())


def test_discounts_that_cannot_be_estimated_are_an_error(tmp_path):
    path = tmp_path / "model.arpa"
    with pytest.raises(
        MaxlmError, match="2-grams, of which 7, 1, 0 and 0 have"
    ) as error:
        estimate_kneser_ney(["a b", "b c", "c c"], path, KneserNeyConfig(order=2))
    assert "discount_fallback" in str(error.value)
