"""Modified interpolated Kneser-Ney n-gram models, estimated from text.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", with the
conventions of Heafield et al. 2013 (KenLM's `lmplz`), whose models ours equal up to rounding:
unigrams are interpolated with a uniform distribution over the words, </s> and <unk>; <s> is only
ever a context.

The different n-grams of an order are numbered in suffix order: by their last word, then by the one
before it, and so on. So an n-gram is a pair of numbers: that of its suffix, the words behind its
first, among the (n - 1)-grams; and its first word.
"""

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.runtime.files import convert_write_errors, replace_file

_SPECIAL = (b"<unk>", b"<s>", b"</s>")
_BEGIN, _END = 1, 2  # The ids of <s> and </s>; 0 is <unk>.
_NO_WORDS = {*_SPECIAL, b"<UNK>"}  # The last is <unk> to KenLM.
_WORD_BYTES = 100  # That a word of the text takes in memory, at least.
_LINES = 1 << 12  # Of an ARPA file, made at a time.


class KneserNeyConfig(Config):
    """Settings of an n-gram model's estimation."""

    order: int = Field(default=5, ge=1, le=6)
    """Words in the longest n-grams."""
    prune: tuple[int, ...] = ()
    """Counts up to which n-grams are left out, by order from 1; the last number holds for the
    orders after it. Must not fall. () or (0,) leaves nothing out; (0, 0, 1) leaves out n-grams of
    three or more words that occur once, for a model of a third the size that is a little worse."""
    discount_fallback: tuple[float, float, float] | None = None
    """Discounts of counts 1, 2, and 3 or more, for orders where they cannot be estimated because
    the text is small or artificial, such as (0.5, 1, 1.5); null: that is an error."""

    @model_validator(mode="after")
    def _check(self) -> "KneserNeyConfig":
        if len(self.prune) > self.order:
            raise ValueError(f"prune has {len(self.prune)} numbers for order {self.order}")
        if list(self.prune) != sorted(self.prune) or any(p < 0 for p in self.prune):
            raise ValueError("prune must not fall from one order to the next")
        for i, discount in enumerate(self.discount_fallback or ()):
            if not 0 <= discount <= i + 1:
                raise ValueError(f"the discount of count {i + 1} must lie within 0 and {i + 1}")
        return self

    @property
    def prune_thresholds(self) -> tuple[int, ...]:
        """`prune` for every order."""
        return self.prune + (self.prune[-1:] or (0,)) * (self.order - len(self.prune))


@dataclass(frozen=True)
class KneserNeyReport:
    """The contents of an estimated model."""

    tokens: int
    """Words and sentence ends."""
    ngrams: tuple[int, ...]
    """Number of n-grams in the model, by order."""
    discounts: tuple[tuple[float, float, float], ...]
    """Discounts of the adjusted counts 1, 2, and 3 or more, by order."""


@dataclass
class _Ngrams:
    """The different n-grams of one order, in suffix order; arrays have an entry for each."""

    first: np.ndarray
    """Ids of their first words."""
    suffix: np.ndarray
    """Numbers, among the (n - 1)-grams, of the words behind the first."""
    context: np.ndarray
    """Numbers, among the (n - 1)-grams, of the words before the last."""
    count: np.ndarray
    """Occurrences of each, until `_adjust_counts`; int64."""
    kept: np.ndarray
    """Whether each is kept, not pruned."""


def estimate_kneser_ney(
    sentences: Iterable[str], arpa_path: Path, config: KneserNeyConfig
) -> KneserNeyReport:
    """Estimates a model and writes it to an ARPA file, which appears when complete.

    N-grams are written in suffix order. Memory is 100 to 220 bytes for each word of the text, the
    more the more of its n-grams differ.

    Args:
        sentences: their words separated by ASCII white space or NUL; <s>, </s> and <unk> are read
            as white space.

    Raises:
        MaxlmError: there are no words, or more than memory holds; the discounts cannot be
            estimated and there is no `discount_fallback`; the disk is full.
    """
    words, ids = _read_words(sentences)
    if len(words) <= len(_SPECIAL):
        raise MaxlmError("there are no words to estimate an n-gram model from")
    orders = _count_ngrams(ids, len(words), config.prune_thresholds)
    _adjust_counts(orders)
    discounts = [
        _estimate_discounts(order, grams.count, config.discount_fallback)
        for order, grams in enumerate(orders, 1)
    ]
    with convert_write_errors(arpa_path), replace_file(arpa_path) as new, new.open("wb") as file:
        _write_model(file, words, orders, discounts)
    return KneserNeyReport(
        int(np.count_nonzero(ids != _BEGIN)),
        tuple(int(grams.kept.sum()) for grams in orders),
        tuple((d[1], d[2], d[3]) for d in discounts),
    )


def _read_words(sentences: Iterable[str]) -> tuple[list[bytes], np.ndarray]:
    """Returns the words by id, and the ids of the text, each sentence from <s> to </s>."""
    numbers, ids = {word: number for number, word in enumerate(_SPECIAL)}, array("I")
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _WORD_BYTES
    for sentence in sentences:
        if len(ids) > most:
            what = f"the text has more than {most:,} words, which is what fits into memory"
            raise MaxlmError(what, fix="train on a sample of it")
        words = sentence.encode(errors="replace").replace(b"\0", b" ").split()
        if "<" in sentence:
            words = [word for word in words if word not in _NO_WORDS]
        ids.append(_BEGIN)
        ids.extend(numbers.setdefault(word, len(numbers)) for word in words)
        ids.append(_END)
    return list(numbers), np.frombuffer(ids, np.uint32) if ids else np.empty(0, np.uint32)


def _count_ngrams(ids: np.ndarray, num_words: int, thresholds: tuple[int, ...]) -> list[_Ngrams]:
    """Counts the n-grams of each order; those that occur at most `thresholds` times are pruned."""
    words = np.arange(num_words)
    counts = np.bincount(ids, minlength=num_words)
    counts[_BEGIN] = 0
    none = np.zeros(num_words, np.int64)
    kept = (counts > thresholds[0]) | (words <= _END)
    orders = [_Ngrams(words, none, none, counts, kept)]
    # The number of the n-gram that ends at each place of the text, as far as there is one.
    number = ids
    ends = np.flatnonzero(ids != _BEGIN)
    for order, threshold in enumerate(thresholds[1:], 2):
        if order > 2:  # No n-gram of the order before begins with <s> here.
            ends = ends[ids[ends - order + 2] != _BEGIN]
        keys = number[ends].astype(np.int64) << 32 | ids[ends - order + 1]
        keys, firsts, inverse, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        context = number[ends[firsts] - 1].astype(np.int64)
        first, suffix = keys & (2**32 - 1), keys >> 32
        orders.append(_Ngrams(first, suffix, context, counts, counts > threshold))
        number = np.zeros(len(ids), np.uint32)
        number[ends] = inverse
    return orders


def _adjust_counts(orders: list[_Ngrams]) -> None:
    """Replaces the counts of n-grams that a longer one may end with, unless they begin with <s>, by
    the number of different words to their left (Heafield et al. 2013, section 3)."""
    for grams, longer in pairwise(orders):
        left = np.bincount(longer.suffix, minlength=len(grams.count))
        grams.count = np.where(grams.first == _BEGIN, grams.count, left)


def _estimate_discounts(
    order: int, counts: np.ndarray, fallback: tuple[float, ...] | None
) -> list[float]:
    """Estimates the discounts of the adjusted counts 0, 1, 2, 3+ of an order's n-grams (Chen and
    Goodman 1999, equation 26)."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).tolist()
    if all(n[1:4]):
        y = n[1] / (n[1] + 2 * n[2])
        discounts = [0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))]
        if all(0 <= discounts[j] <= j for j in (1, 2, 3)):
            return discounts
    if fallback is None:
        raise MaxlmError(
            f"no discounts can be estimated for {order}-grams, of which {n[1]:,}, {n[2]:,}, "
            f"{n[3]:,} and {n[4]:,} have the counts 1, 2, 3 and 4",
            fix="take more text, drop repeated lines, or set discount_fallback: [0.5, 1, 1.5]",
        )
    return [0.0, *fallback]


def _discount(
    grams: _Ngrams, discounts: list[float], num_contexts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each n-gram's discounted probability, and each context's weight of the lower order
    (Heafield et al. 2013, equations 1-3): 1 for what is the context of none.

    With pruning, the mass of what is left out goes to the lower order.
    """
    amounts = np.array(discounts)[np.minimum(grams.count, 3)]
    freed = np.where(grams.kept, amounts, grams.count)
    total = np.bincount(grams.context, grams.count, num_contexts)
    weight = np.bincount(grams.context, freed, num_contexts)
    weight = np.where(total > 0, weight / np.maximum(total, 1), 1.0)
    return (grams.count - amounts) / total[grams.context], weight


def _write_model(
    file: IO[bytes], words: list[bytes], orders: list[_Ngrams], discounts: list[list[float]]
) -> None:
    """Interpolates order by order and writes the n-grams to an ARPA file."""
    sizes = (b"ngram %d=%d" % (n, grams.kept.sum()) for n, grams in enumerate(orders, 1))
    file.write(b"\n".join([b"\\data\\", *sizes]) + b"\n")
    # Below unigrams lies the uniform distribution over all words but <s>.
    lower = np.array([1 / (orders[0].kept.sum() - 1)])
    chances, weights = _discount(orders[0], discounts[0], 1)
    for order, grams in enumerate(orders, 1):
        lower = chances + weights[grams.context] * lower[grams.suffix]
        if order == 1:
            lower[_BEGIN] = 1  # Means nothing; as KenLM has it.
        backoffs = None
        if order < len(orders):
            chances, weights = _discount(orders[order], discounts[order], len(lower))
            backoffs = _log10(weights)
        file.write(b"\n\\%d-grams:\n" % order)
        _write_ngrams(file, words, orders[:order], _log10(lower), backoffs)
    file.write(b"\n\\end\\\n")


def _log10(values: np.ndarray) -> np.ndarray:
    """Never above 0 by rounding; -99 for the logarithm of 0, as ARPA files have it."""
    with np.errstate(divide="ignore"):
        return np.maximum(np.minimum(np.log10(values), -0.0), -99)


def _write_ngrams(
    file: IO[bytes],
    words: list[bytes],
    orders: list[_Ngrams],
    chances: np.ndarray,
    backoffs: np.ndarray | None,
) -> None:
    """Writes ARPA lines of the last of `orders`."""
    kept = np.flatnonzero(orders[-1].kept)
    for rows in np.split(kept, range(_LINES, len(kept), _LINES)):
        columns, number = [], rows
        for grams in reversed(orders):
            columns.append(grams.first[number].tolist())
            number = grams.suffix[number]
        ends = [b"\n"] * len(rows)
        if backoffs is not None:
            ends = [b"\t%.7f\n" % backoff for backoff in backoffs[rows]]
        for chance, end, *gram in zip(chances[rows].tolist(), ends, *columns, strict=True):
            file.write(b"%.7f\t%b%b" % (chance, b" ".join([words[i] for i in gram]), end))
