"""Modified interpolated Kneser-Ney n-gram models, estimated from text.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language
modeling", with the conventions of Heafield et al. 2013 (KenLM's `lmplz`), whose models
ours equal up to rounding: unigrams are interpolated with a uniform distribution over
the words, </s> and <unk>; <s> is only ever a context.

The different n-grams of an order are numbered in suffix order: by their last word, then
by the one before it, and so on. So an n-gram is a pair of numbers: that of its suffix,
the words behind its first, among the (n - 1)-grams; and its first word.
"""

import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.runtime.files import convert_write_errors, replace_file

_SPECIAL_WORDS = (b"<unk>", b"<s>", b"</s>")
_BEGIN = 1  # The id of <s>; that of <unk> is 0.
_END = 2  # The id of </s>.
_LEFT_OUT = frozenset({*_SPECIAL_WORDS, b"<UNK>"})  # The last is <unk> to KenLM.
_BYTES_PER_WORD = 100  # That a word of the text takes in memory, at least.
_LINES_AT_A_TIME = 1 << 12  # Of an ARPA file.


class KneserNeyConfig(Config):
    """Settings of an n-gram model's estimation."""

    order: int = Field(default=5, ge=1, le=6)
    """Words in the longest n-grams."""
    prune: tuple[int, ...] = ()
    """Counts up to which n-grams are left out, by order from 1; the last number holds
    for the orders after it. Must not fall. () or (0,) leaves nothing out; (0, 0, 1)
    leaves out n-grams of three or more words that occur once, for a model of a third
    the size that is a little worse."""
    discount_fallback: tuple[float, float, float] | None = None
    """Discounts of counts 1, 2, and 3 or more, for orders where they cannot be
    estimated because the text is small or artificial, such as (0.5, 1, 1.5); null: that
    is an error."""

    @model_validator(mode="after")
    def _check(self) -> "KneserNeyConfig":
        if len(self.prune) > self.order:
            raise ValueError(
                f"prune has {len(self.prune)} numbers for order {self.order}"
            )
        falls = list(self.prune) != sorted(self.prune)
        if falls or any(count < 0 for count in self.prune):
            raise ValueError("prune must not fall from one order to the next")
        for count, discount in enumerate(self.discount_fallback or (), 1):
            if not 0 <= discount <= count:
                raise ValueError(
                    f"the discount of count {count} must lie within 0 and {count}"
                )
        return self

    @property
    def prune_thresholds(self) -> tuple[int, ...]:
        """`prune` for every order."""
        last = self.prune[-1:] or (0,)
        return self.prune + last * (self.order - len(self.prune))


@dataclass(frozen=True)
class KneserNeyReport:
    """The contents of an estimated model."""

    num_tokens: int
    """Words and sentence ends of the text."""
    num_ngrams: tuple[int, ...]
    """Number of n-grams in the model, by order."""
    discounts: tuple[tuple[float, float, float], ...]
    """Discounts of the adjusted counts 1, 2, and 3 or more, by order."""


@dataclass
class _Ngrams:
    """The different n-grams of one order, in suffix order; arrays have an entry for
    each."""

    first: np.ndarray
    """Ids of their first words."""
    suffix: np.ndarray
    """Numbers, among the (n - 1)-grams, of the words behind the first."""
    context: np.ndarray
    """Numbers, among the (n - 1)-grams, of the words before the last."""
    count: np.ndarray
    """Occurrences of each, until `_adjust_counts`; int64."""
    in_model: np.ndarray
    """Whether each is in the model, not pruned; bool."""


def estimate_kneser_ney(
    sentences: Iterable[str], arpa_path: Path, config: KneserNeyConfig
) -> KneserNeyReport:
    """Estimates a model and writes it to an ARPA file, which appears when complete.

    N-grams are written in suffix order. Memory is 100 to 220 bytes for each word of the
    text, the more the more of its n-grams differ.

    Args:
        sentences: their words separated by ASCII white space or NUL; <s>, </s> and
            <unk> are read as white space.

    Raises:
        MaxlmError: there are no words, or more than memory holds; the discounts cannot
            be estimated and there is no `discount_fallback`; the disk is full.
    """
    words, ids = _read_words(sentences)
    if len(words) <= len(_SPECIAL_WORDS):
        raise MaxlmError("there are no words to estimate an n-gram model from")
    orders = _count_ngrams(ids, len(words), config.prune_thresholds)
    _adjust_counts(orders)
    discounts = [
        _estimate_discounts(order, ngrams.count, config.discount_fallback)
        for order, ngrams in enumerate(orders, 1)
    ]
    with (
        convert_write_errors(arpa_path),
        replace_file(arpa_path) as new,
        new.open("wb") as file,
    ):
        _write_model(file, words, orders, discounts)
    return KneserNeyReport(
        num_tokens=int(np.count_nonzero(ids != _BEGIN)),
        num_ngrams=tuple(int(ngrams.in_model.sum()) for ngrams in orders),
        discounts=tuple(
            (by_count[1], by_count[2], by_count[3]) for by_count in discounts
        ),
    )


def _read_words(sentences: Iterable[str]) -> tuple[list[bytes], np.ndarray]:
    """Returns the words by id, and the ids of the text, each sentence from <s> to
    </s>."""
    id_of_word = {word: number for number, word in enumerate(_SPECIAL_WORDS)}
    ids = array("I")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    max_words = memory // _BYTES_PER_WORD
    for sentence in sentences:
        if len(ids) > max_words:
            message = (
                f"the text has more than {max_words:,} words, which is what fits into "
                "memory"
            )
            raise MaxlmError(message, fix="train on a sample of it")
        words = sentence.encode(errors="replace").replace(b"\0", b" ").split()
        if "<" in sentence:
            words = [word for word in words if word not in _LEFT_OUT]
        ids.append(_BEGIN)
        for word in words:
            ids.append(id_of_word.setdefault(word, len(id_of_word)))
        ids.append(_END)
    return list(id_of_word), np.array(ids, np.uint32)


def _count_ngrams(
    ids: np.ndarray, num_words: int, thresholds: Sequence[int]
) -> list[_Ngrams]:
    """Counts the n-grams of each order; those that occur at most `thresholds` times are
    pruned."""
    words = np.arange(num_words)
    counts = np.bincount(ids, minlength=num_words)
    counts[_BEGIN] = 0
    zeros = np.zeros(num_words, np.int64)
    is_special = words <= _END
    in_model = (counts > thresholds[0]) | is_special
    orders = [
        _Ngrams(
            first=words, suffix=zeros, context=zeros, count=counts, in_model=in_model
        )
    ]
    # The number of the n-gram of the order before that ends at each place of the text,
    # as far as there is one.
    number_at = ids
    # The places where an n-gram of this order ends: all within one sentence.
    ends = np.flatnonzero(ids != _BEGIN)
    for order, threshold in enumerate(thresholds[1:], 2):
        if order > 2:  # No n-gram of the order before begins with <s> here.
            ends = ends[ids[ends - order + 2] != _BEGIN]
        # An n-gram as one number: its suffix in the upper half, its first word in the
        # lower. So n-grams are numbered in suffix order.
        keys = number_at[ends].astype(np.int64) << 32 | ids[ends - order + 1]
        keys, first_occurrences, numbers, counts = np.unique(
            keys, return_index=True, return_inverse=True, return_counts=True
        )
        context_ends = ends[first_occurrences] - 1
        orders.append(
            _Ngrams(
                first=keys & (2**32 - 1),
                suffix=keys >> 32,
                context=number_at[context_ends].astype(np.int64),
                count=counts,
                in_model=counts > threshold,
            )
        )
        number_at = np.zeros(len(ids), np.uint32)
        number_at[ends] = numbers
    return orders


def _adjust_counts(orders: Sequence[_Ngrams]) -> None:
    """Replaces the counts of n-grams that a longer one may end with, unless they begin
    with <s>, by the number of different words to their left (Heafield et al. 2013,
    section 3)."""
    for ngrams, longer in pairwise(orders):
        num_left_words = np.bincount(longer.suffix, minlength=len(ngrams.count))
        ngrams.count = np.where(ngrams.first == _BEGIN, ngrams.count, num_left_words)


def _estimate_discounts(
    order: int, counts: np.ndarray, fallback: Sequence[float] | None
) -> list[float]:
    """Estimates the discounts of the adjusted counts 0, 1, 2, 3+ of an order's n-grams.

    Chen and Goodman 1999, equation 26: with n_j the n-grams of count j and Y = n_1 /
    (n_1 + 2 n_2), D_j = j - (j + 1) Y n_(j + 1) / n_j.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).tolist()
    if all(n[1:4]):
        y = n[1] / (n[1] + 2 * n[2])
        discounts = [0.0]
        for j in (1, 2, 3):
            discounts.append(j - (j + 1) * y * n[j + 1] / n[j])
        if all(0 <= discounts[j] <= j for j in (1, 2, 3)):
            return discounts
    if fallback is None:
        message = (
            f"no discounts can be estimated for {order}-grams, of which {n[1]:,}, "
            f"{n[2]:,}, {n[3]:,} and {n[4]:,} have the counts 1, 2, 3 and 4"
        )
        fix = (
            "take more text, drop repeated lines, or set discount_fallback: [0.5, 1, "
            "1.5]"
        )
        raise MaxlmError(message, fix=fix)
    return [0.0, *fallback]


def _discount(
    ngrams: _Ngrams, discounts: Sequence[float], num_contexts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each n-gram's discounted probability, and each context's weight of the
    lower order (Heafield et al. 2013, equations 1-3): 1 for what is the context of
    none.

    With pruning, the mass of what is left out goes to the lower order.
    """
    # Of each n-gram: what is taken from its count, all of it where it is left out.
    amounts = np.array(discounts)[np.minimum(ngrams.count, 3)]
    freed = np.where(ngrams.in_model, amounts, ngrams.count)
    # Of each context: the sums of both over the n-grams that it begins.
    totals = np.bincount(ngrams.context, ngrams.count, num_contexts)
    freed_totals = np.bincount(ngrams.context, freed, num_contexts)
    weights = np.where(totals > 0, freed_totals / np.maximum(totals, 1), 1.0)
    probabilities = (ngrams.count - amounts) / totals[ngrams.context]
    return probabilities, weights


def _write_model(
    file: IO[bytes],
    words: Sequence[bytes],
    orders: Sequence[_Ngrams],
    discounts: Sequence[Sequence[float]],
) -> None:
    """Interpolates order by order and writes the n-grams to an ARPA file."""
    file.write(b"\\data\\\n")
    for order, ngrams in enumerate(orders, 1):
        file.write(b"ngram %d=%d\n" % (order, ngrams.in_model.sum()))
    # Below unigrams lies the uniform distribution over all words but <s>.
    num_predicted = orders[0].in_model.sum() - 1
    lower = np.array([1 / num_predicted])
    discounted, weights = _discount(orders[0], discounts[0], num_contexts=1)
    for order, ngrams in enumerate(orders, 1):
        probabilities = discounted + weights[ngrams.context] * lower[ngrams.suffix]
        if order == 1:
            probabilities[_BEGIN] = 1  # Means nothing; as KenLM has it.
        backoffs = None
        if order < len(orders):
            # An n-gram's backoff is its weight as a context of the next order.
            discounted, weights = _discount(
                orders[order], discounts[order], num_contexts=len(probabilities)
            )
            backoffs = _compute_log10(weights)
        file.write(b"\n\\%d-grams:\n" % order)
        log10_probabilities = _compute_log10(probabilities)
        _write_ngrams(file, words, orders[:order], log10_probabilities, backoffs)
        lower = probabilities
    file.write(b"\n\\end\\\n")


def _compute_log10(values: np.ndarray) -> np.ndarray:
    """Computes logarithms of probabilities: never above 0 by rounding; -99 for the
    logarithm of 0, as ARPA files have it."""
    with np.errstate(divide="ignore"):
        logarithms = np.log10(values)
    return np.maximum(np.minimum(logarithms, -0.0), -99)


def _write_ngrams(
    file: IO[bytes],
    words: Sequence[bytes],
    orders: Sequence[_Ngrams],
    log10_probabilities: np.ndarray,
    log10_backoffs: np.ndarray | None,
) -> None:
    """Writes ARPA lines of the last of `orders`, of which the highest has no
    backoffs."""
    in_model = np.flatnonzero(orders[-1].in_model)
    piece_starts = range(_LINES_AT_A_TIME, len(in_model), _LINES_AT_A_TIME)
    for rows in np.split(in_model, piece_starts):
        # Words from the first on: that of each suffix, down to unigrams.
        columns = []
        numbers = rows
        for ngrams in reversed(orders):
            columns.append(ngrams.first[numbers].tolist())
            numbers = ngrams.suffix[numbers]
        endings = [b"\n"] * len(rows)
        if log10_backoffs is not None:
            endings = [b"\t%.7f\n" % backoff for backoff in log10_backoffs[rows]]
        probabilities = log10_probabilities[rows].tolist()
        for probability, ending, *ids in zip(
            probabilities, endings, *columns, strict=True
        ):
            text = b" ".join([words[i] for i in ids])
            file.write(b"%.7f\t%b%b" % (probability, text, ending))
