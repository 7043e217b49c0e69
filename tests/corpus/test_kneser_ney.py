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
MODELS = {  # name: text, settings
    "story1": ("story", KneserNeyConfig(order=1, discount_fallback=FALLBACK)),
    "story2": ("story", KneserNeyConfig(order=2, prune=(1,))),
    "story3": ("story", KneserNeyConfig(order=3)),
    "story3pruned": ("story", KneserNeyConfig(order=3, prune=(0, 0, 1))),
    "short": ("short", KneserNeyConfig(order=4, discount_fallback=FALLBACK)),
    "single": ("single", KneserNeyConfig(order=4, discount_fallback=FALLBACK)),
    "words": ("words", KneserNeyConfig(order=3, discount_fallback=(0.4, 0.9, 0.9))),
}


def estimate(folder, sentences, config):
    path = folder / "model.arpa"
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
            # N-grams of the highest order have no backoff.
            backoff = float(columns[2]) if len(columns) > 2 else None
            yield columns[1], float(columns[0]), backoff


def grams_of(path):
    """(log10 of probability, of backoff) by n-gram."""
    grams = {}
    for line in path.read_text("utf-8").split("\n"):
        if "\t" in line:
            probability, words, *backoffs = line.split("\t")
            backoff = float(backoffs[0]) if backoffs else 0.0
            grams[tuple(words.split(" "))] = (float(probability), backoff)
    return grams


@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_that_of_lmplz_line_by_line(name, tmp_path):
    text, config = MODELS[name]
    with (LMPLZ / f"{text}.txt").open(encoding="utf-8", newline="\n") as sentences:
        path, report = estimate(tmp_path, sentences, config)
    theirs = list(lines_of(LMPLZ / f"{name}.arpa"))
    for ours, their in zip_longest(lines_of(path), theirs):
        assert ours[0] == their[0]
        assert ours[1:] == pytest.approx(their[1:], abs=5e-7)
    headers = [text for text, _, _ in theirs if text.startswith("ngram ")]
    counts = [int(header.split("=")[1]) for header in headers]
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
        # Of the highest order the plain counts; below, how many words come before.
        self.adjusted = [Counter(counter) for counter in count]
        for k in range(1, order):
            num_left_words = Counter(gram[1:] for gram in count[k + 1])
            for gram in count[k]:
                # Nothing comes before the start of a sentence: its count stays.
                if gram[0] != "<s>":
                    self.adjusted[k][gram] = num_left_words[gram]
        self.words = {gram[0] for gram in count[1]} | {"<unk>"}
        self.discounts = [[0.0] * 4]
        self.discounts += [self._discounts(k, fallback) for k in range(1, order + 1)]

    def _discounts(self, k, fallback):
        n = Counter(self.adjusted[k].values())
        if not (n[1] and n[2] and n[3]):
            return [0.0, *fallback]
        y = n[1] / (n[1] + 2 * n[2])
        discounts = [0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))]
        if all(0 <= discounts[j] <= j for j in (1, 2, 3)):
            return discounts
        return [0.0, *fallback]

    def discount(self, k, count):
        return self.discounts[k][min(count, 3)]

    def backoff(self, context):
        k = len(context) + 1
        counts = [c for gram, c in self.adjusted[k].items() if gram[:-1] == context]
        if not counts:
            return 1.0
        return sum(self.discount(k, count) for count in counts) / sum(counts)

    def probability(self, gram):
        k = len(gram)
        if k == 0:
            return 1 / len(self.words)
        context = gram[:-1]
        adjusted = self.adjusted[k]
        total = sum(adjusted[other] for other in adjusted if other[:-1] == context)
        lower = self.probability(gram[1:])
        if not total:
            return lower
        count = adjusted[gram]
        discounted = (count - self.discount(k, count)) / total
        return discounted + self.backoff(context) * lower


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
    config = KneserNeyConfig(order=order, discount_fallback=fallback)
    with tempfile.TemporaryDirectory() as folder:
        path, _ = estimate(Path(folder), sentences, config)
        estimates = grams_of(path)
    seen = {gram for counts in naive.adjusted for gram in counts}
    assert estimates.keys() == seen | {("<unk>",), ("<s>",)}
    for gram in seen | {("<unk>",)}:
        probability, backoff = estimates[gram]
        assert 10**probability == pytest.approx(naive.probability(gram), abs=1e-6)
        if len(gram) < order:
            assert 10**backoff == pytest.approx(naive.backoff(gram), abs=1e-6)


def test_the_end_of_a_sentence_is_never_pruned(tmp_path):
    config = KneserNeyConfig(order=2, prune=(1,), discount_fallback=FALLBACK)
    path, report = estimate(tmp_path, ["a b a b a b c"], config)
    words = {gram[0] for gram in grams_of(path) if len(gram) == 1}
    assert words == {"<unk>", "<s>", "</s>", "a", "b"}
    assert report.num_ngrams[0] == 5


def test_special_words_in_a_text_are_white_space(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = KneserNeyConfig(discount_fallback=FALLBACK)
    plain, _ = estimate(tmp_path / "a", ["a b", "", "<b c>"], config)
    text = ["a <s> b </s>", "<unk>", "<s> <b\0c>\n"]
    special, _ = estimate(tmp_path / "b", text, config)
    assert plain.read_bytes() == special.read_bytes()


@pytest.mark.parametrize("sentences", [[], ["", " \t ", "<s>"]])
def test_no_words_are_an_error(sentences, tmp_path):
    with pytest.raises(MaxlmError, match="no words"):
        estimate_kneser_ney(sentences, tmp_path / "model.arpa", KneserNeyConfig())
    assert not list(tmp_path.iterdir())


def test_discounts_that_cannot_be_estimated_are_an_error(tmp_path):
    path = tmp_path / "model.arpa"
    config = KneserNeyConfig(order=2)
    message = "2-grams, of which 7, 1, 0 and 0 have"
    with pytest.raises(MaxlmError, match=message) as error:
        estimate_kneser_ney(["a b", "b c", "c c"], path, config)
    assert "discount_fallback" in str(error.value)
