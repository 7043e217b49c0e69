"""Modified interpolated Kneser-Ney n-gram models, estimated from text.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", with the
conventions of Heafield et al. 2013 (KenLM's `lmplz`), whose models ours equal up to rounding:
unigrams are interpolated with a uniform distribution over the words, </s> and <unk>; <s> is only
ever a context.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.corpus.ngram_counts import (
    BEGIN,
    NgramCounts,
    NgramTable,
    TokenFile,
    count_ngrams,
    load_ngram_loops,
    mark_key_starts,
    read_tokens,
    sort_runs,
)
from maxlm.runtime.files import convert_write_errors, replace_file

_PRUNED = np.uint64(1 << 63)  # As in `ngram_loops`.
_LINES = 1 << 12  # Of an ARPA file, made at a time.
_ROW_BYTES = 24


class KneserNeyConfig(Config):
    """Settings of an n-gram model's estimation."""

    order: int = Field(default=5, ge=1, le=6)
    """Words in the longest n-grams."""
    prune: tuple[int, ...] = ()
    """By order from 1, leave out n-grams that occur at most so often; the last number holds for the
    orders after it. Must not fall. () or (0,) leaves nothing out; (0, 0, 1) all but n-grams of one
    and two words that occur once, for a model of a third the size that is a little worse."""
    discount_fallback: tuple[float, float, float] | None = None
    """Discounts of counts 1, 2, and 3 or more, for orders where they cannot be estimated because
    the text is small or artificial, such as (0.5, 1, 1.5); null: that is an error."""
    memory_bytes: int = Field(default=1 << 30, ge=1 << 20)
    """Memory for n-grams; what exceeds it goes to files. The words come on top, each once."""

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
    def thresholds(self) -> tuple[int, ...]:
        """`prune` for every order."""
        return self.prune + (self.prune[-1:] or (0,)) * (self.order - len(self.prune))

    @property
    def block(self) -> int:
        """Rows of a sort that fit into `memory_bytes`."""
        return self.memory_bytes // (_ROW_BYTES * (self.order + 4))


@dataclass(frozen=True)
class KneserNeyReport:
    """The contents of an estimated model."""

    tokens: int
    """Words and sentence ends."""
    ngrams: tuple[int, ...]
    """By order, in the model."""
    discounts: tuple[tuple[float, float, float], ...]
    """By order, of the adjusted counts 1, 2, and 3 or more."""


def estimate_kneser_ney(
    sentences: Iterable[str], path: Path, config: KneserNeyConfig, scratch: Path | None = None
) -> KneserNeyReport:
    """Estimates a model and writes it to an ARPA file, which appears when complete.

    N-grams are written in suffix order. Only the words (about 150 bytes each) grow in memory with
    the text; on disk about 100 bytes for each n-gram of each order are needed besides the model.

    Args:
        sentences: their words separated by white space.
        scratch: where to make a folder for the time being; None: the system's.

    Raises:
        MaxlmError: there are no words, too many different ones for the order, the discounts cannot
            be estimated and there is no `discount_fallback`, or the disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="ngrams-", dir=scratch) as name:
        folder = Path(name)
        tokens = read_tokens(sentences, folder / "tokens", config.block)
        if len(tokens.words) <= 3:
            raise MaxlmError("there are no words to estimate an n-gram model from")
        counts = count_ngrams(tokens, config.thresholds, folder, config.block)
        discounts = [
            _estimate_discounts(order, n, config.discount_fallback)
            for order, n in enumerate(counts.with_count.tolist(), 1)
        ]
        smoothed = [
            _smooth(table, k * tokens.bits, discounts[k], folder / f"smooth-{k}", config.block)
            for k, table in enumerate(counts.tables)
        ]
        with convert_write_errors(path), replace_file(path) as new, new.open("wb") as file:
            _interpolate(file, tokens, counts, smoothed, folder, config.block)
        return KneserNeyReport(
            len(tokens.ids()),
            tuple(counts.kept.tolist()),
            tuple((d[1], d[2], d[3]) for d in discounts),
        )


def _estimate_discounts(
    order: int, n: list[int], fallback: tuple[float, ...] | None
) -> list[float]:
    """Estimates the discounts of the counts 0, 1, 2, 3+ from numbers of n-grams by adjusted count.

    Chen and Goodman 1999, equation 26.
    """
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


@dataclass(frozen=True)
class _Smoothed:
    """One order's n-grams before interpolation."""

    values: NgramTable
    """float64, row by row with the counts: discounted probability, weight of the lower order."""
    gammas: NgramTable
    """(key of a context, that weight as float64) in suffix order: the contexts' backoffs."""


def _smooth(
    table: NgramTable, context_bits: int, discounts: list[float], path: Path, block: int
) -> _Smoothed:
    """Discounts the n-grams of one order, which takes a sort by contexts and one back."""
    grams = table.open()
    gammas = NgramTable(path.with_name(f"{path.name}-gammas"), 3)
    values = NgramTable(path.with_name(f"{path.name}-values"), 2)
    high_mask = np.uint64((1 << max(0, context_bits - 64)) - 1)
    low_mask = np.uint64((1 << min(64, context_bits)) - 1)

    def by_context() -> Iterator[np.ndarray]:
        """Yields rows (key of the context, index, count)."""
        for first in range(0, len(grams), block):
            part = grams[first : first + block]
            index = np.arange(first, first + len(part), dtype=np.uint64)
            keys = part[:, 0] & high_mask, part[:, 1] & low_mask
            yield np.stack([*keys, index, part[:, 2]], 1)

    def by_index() -> Iterator[np.ndarray]:
        """Yields rows (0, index, discounted probability, weight of the lower order)."""
        for rows in sort_runs(by_context(), path, block):
            contexts, smoothed = _discount(rows, np.array(discounts))
            gammas.append(contexts)
            yield smoothed

    for rows in sort_runs(by_index(), path.with_name(f"{path.name}-back"), block):
        values.append(rows[:, 2:])
    return _Smoothed(values, gammas)


def _discount(rows: np.ndarray, discounts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes discounted probabilities and interpolation weights (Heafield 2013, equations 1-3).

    With pruning, the mass of what is left out goes to the lower order.

    Args:
        rows: (key of the context, index, adjusted count), sorted by context.
        discounts: float64 [4] of the adjusted counts 0, 1, 2, and more.

    Returns:
        Rows (key, weight) of the contexts, and rows (0, index, probability, weight); weights and
        probabilities are float64.
    """
    count, first = rows[:, 3] & ~_PRUNED, mark_key_starts(rows)
    starts, group = np.flatnonzero(first), np.cumsum(first) - 1
    amounts = discounts[np.minimum(count, np.uint64(3)).astype(np.int64)]
    freed = np.where(rows[:, 3] & _PRUNED, count, amounts)
    total = np.add.reduceat(count.astype(np.float64), starts)
    weight = np.add.reduceat(freed, starts) / total
    contexts = np.column_stack([rows[starts, :2], weight.view(np.uint64)])
    chance = (count - amounts) / total[group]
    index = np.stack([np.zeros_like(count), rows[:, 2]], 1)
    return contexts, np.column_stack([index, chance.view(np.uint64), weight[group].view(np.uint64)])


def _interpolate(
    file: IO[bytes],
    tokens: TokenFile,
    counts: NgramCounts,
    smoothed: list[_Smoothed],
    folder: Path,
    block: int,
) -> None:
    """Interpolates order by order and writes the n-grams to an ARPA file."""
    order, loops = len(smoothed), load_ngram_loops()
    sizes = (b"ngram %d=%d" % each for each in enumerate(counts.kept.tolist(), 1))
    file.write(b"\n".join([b"\\data\\", *sizes]) + b"\n")
    # Below unigrams lies the uniform distribution over all words but <s>.
    parents = np.array([[0, 0, 0, 0]], np.uint64)
    parents.view(np.float64)[0, 2] = 1 / (counts.kept[0] - 1)
    for k, (table, smooth) in enumerate(zip(counts.tables, smoothed, strict=True), 1):
        file.write(b"\n\\%d-grams:\n" % k)
        grams, values = table.open(), smooth.values.open().view(np.float64)
        gammas = smoothed[k].gammas.open() if k < order else np.empty((0, 3), np.uint64)
        done, at = NgramTable(folder / f"probabilities-{k}", 4), np.zeros(2, np.int64)
        for first in range(0, len(grams), block):
            part = grams[first : first + block]
            weights = np.array(values[first : first + block])
            if k == 1 and first == 0:
                weights[BEGIN] = 1, 0  # Its probability means nothing; as KenLM has it.
            rows = np.empty((len(part), 4), np.uint64)
            size = loops.compute_kneser_ney_probabilities(
                part, weights, tokens.bits, parents, parents.view(np.float64),
                gammas, gammas.view(np.float64), at, rows, rows.view(np.float64),
            )  # fmt: skip
            done.append(rows[:size])
            _write_ngrams(file, rows[:size], k, tokens, k < order)
        parents = done.open()
    file.write(b"\n\\end\\\n")


def _write_ngrams(
    file: IO[bytes], rows: np.ndarray, order: int, tokens: TokenFile, with_backoffs: bool
) -> None:
    """Writes ARPA lines: log10 of the probability, the words, log10 of the backoff."""
    words, bits, mask = tokens.words, tokens.bits, np.uint64((1 << tokens.bits) - 1)
    for first in range(0, len(rows), _LINES):
        part = rows[first : first + _LINES]
        high, low = part[:, 0].copy(), part[:, 1].copy()
        grams = []
        for _ in range(order):
            grams.append((low & mask).tolist())
            low = low >> np.uint64(bits) | high << np.uint64(64 - bits)
            high >>= np.uint64(bits)
        chances = part[:, 2:].view(np.float64)
        with np.errstate(divide="ignore"):
            # Never above 0 by rounding; -99 for the logarithm of 0, as ARPA files have it.
            logs = np.maximum(np.minimum(np.log10(chances), -0.0), -99)
        for (chance, backoff), *gram in zip(logs.tolist(), *grams, strict=True):
            text = b" ".join([words[i] for i in gram])
            end = b"\t%.7f\n" % backoff if with_backoffs else b"\n"
            file.write(b"%.7f\t%b%b" % (chance, text, end))
