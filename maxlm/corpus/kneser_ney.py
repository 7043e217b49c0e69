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

import numpy as np
from pydantic import Field, model_validator

from maxlm.config import Config, MaxlmError
from maxlm.corpus.arpa_file import ArpaFile
from maxlm.corpus.compiled import compiled
from maxlm.corpus.kenlm_file import KenlmFile
from maxlm.corpus.ngram_counts import (
    Counts,
    Table,
    Tokens,
    count_ngrams,
    read_tokens,
    sort_runs,
)
from maxlm.runtime.files import replacing

_ROW_BYTES = 24


class KneserNeyConfig(Config):
    """How to estimate an n-gram model."""

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
    """What a model was made of."""

    tokens: int
    """Words and sentence ends."""
    ngrams: tuple[int, ...]
    """By order, in the model."""
    discounts: tuple[tuple[float, float, float], ...]
    """By order, of the adjusted counts 1, 2, and 3 or more."""


def estimate_kneser_ney(
    sentences: Iterable[str],
    path: Path,
    config: KneserNeyConfig,
    scratch: Path | None = None,
    binary: bool = False,
) -> KneserNeyReport:
    """Estimate a model and write it to a file, which appears when complete.

    N-grams are written in suffix order. Only the words (about 150 bytes each) grow in memory with
    the text; on disk about 100 bytes for each n-gram of each order are needed besides the model.

    Args:
        sentences: their words separated by white space.
        scratch: where to make a folder for the time being; None: the system's.
        binary: write KenLM's own format, which opens at once, in place of ARPA.

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
            _discounts(order, n, config.discount_fallback)
            for order, n in enumerate(counts.with_count.tolist(), 1)
        ]
        smoothed = [
            _smooth(table, k * tokens.bits, discounts[k], folder / f"smooth-{k}", config.block)
            for k, table in enumerate(counts.tables)
        ]
        with replacing(path) as new:
            form = KenlmFile if binary else ArpaFile
            file = form(new, tokens.words, tokens.bits, counts.kept.tolist())
            _interpolate(file, tokens, counts, smoothed, folder, config.block)
            file.close()
        return KneserNeyReport(
            len(tokens.ids()),
            tuple(counts.kept.tolist()),
            tuple((d[1], d[2], d[3]) for d in discounts),
        )


def _discounts(order: int, n: list[int], fallback: tuple[float, ...] | None) -> list[float]:
    """Discounts of the counts 0, 1, 2, 3+ from the numbers `n` of n-grams by adjusted count.

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

    values: Table
    """float64, row by row with the counts: discounted probability, weight of the lower order."""
    gammas: Table
    """(key of a context, that weight as float64) in suffix order: the contexts' backoffs."""


def _smooth(
    table: Table, context_bits: int, discounts: list[float], path: Path, block: int
) -> _Smoothed:
    """Discount the n-grams of one order, which takes a sort by contexts and one back."""
    fast = compiled("ngrams")

    grams = table.rows()
    gammas = Table(path.with_name(f"{path.name}-gammas"), 3)
    values = Table(path.with_name(f"{path.name}-values"), 2)

    def by_context() -> Iterator[np.ndarray]:
        for first in range(0, len(grams), block):
            part = grams[first : first + block]
            rows = np.empty((len(part), 4), np.uint64)
            fast.context_rows(part, first, context_bits, rows)
            yield rows

    def by_index() -> Iterator[np.ndarray]:
        for rows in sort_runs(by_context(), context_bits, path, block):
            contexts = np.empty((len(rows), 3), np.uint64)
            amounts = np.array(discounts)
            number = fast.discounted(
                rows, rows.view(np.float64), amounts, contexts, contexts.view(np.float64)
            )
            gammas.append(contexts[:number])
            yield rows

    index_bits = len(grams).bit_length()
    for rows in sort_runs(by_index(), index_bits, path.with_name(f"{path.name}-back"), block):
        values.append(rows[:, 2:])
    return _Smoothed(values, gammas)


def _interpolate(
    file: ArpaFile | KenlmFile,
    tokens: Tokens,
    counts: Counts,
    smoothed: list[_Smoothed],
    folder: Path,
    block: int,
) -> None:
    """Interpolate order by order and add the n-grams to a file."""
    fast = compiled("ngrams")

    # Below unigrams lies the uniform distribution over all words but <s>.
    parents = np.array([[0, 0, 0]], np.uint64)
    parents.view(np.float64)[0, 2] = 1 / (counts.kept[0] - 1)
    for k, (table, smooth) in enumerate(zip(counts.tables, smoothed, strict=True), 1):
        grams, values = table.rows(), smooth.values.rows().view(np.float64)
        gammas = np.empty((0, 3), np.uint64)
        if k < len(smoothed):
            gammas = smoothed[k].gammas.rows()
        done, at = Table(folder / f"probabilities-{k}", 3), np.zeros(2, np.int64)
        for first in range(0, len(grams), block):
            part = grams[first : first + block]
            weights = np.array(values[first : first + block])
            if k == 1 and first == 0:
                weights[fast.BEGIN] = 1, 0  # Its probability means nothing; as KenLM has it.
            keys = np.empty((len(part), 3), np.uint64)
            logarithms = np.empty((len(part), 2))
            size = fast.interpolated(
                part, weights, tokens.bits,
                parents, parents.view(np.float64), gammas, gammas.view(np.float64), at,
                keys, keys.view(np.float64), logarithms,
            )  # fmt: skip
            done.append(keys[:size])
            file.add(k, keys[:size], logarithms[:size])
        parents = done.rows()
