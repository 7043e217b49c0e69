"""MinHash with banding: which documents may be alike, with a chosen probability to see it.

Broder, "On the resemblance and containment of documents" (1997): two sets of Jaccard similarity s
have the same minimum under a random hash function with probability s. With b bands of r such
functions, two documents agree in at least one band with probability 1 - (1 - s^r)^b (Leskovec,
Rajaraman, Ullman, "Mining of Massive Datasets", 3.4).
"""

from dataclasses import dataclass
from math import ceil, log, log1p

import numpy as np

from maxlm.corpus.compiled import compiled
from maxlm.corpus.dedup.words import letter_table
from maxlm.corpus.textbuffers import Texts


@dataclass(frozen=True)
class Banding:
    """How many bands, of how many hash functions (rows) each."""

    bands: int
    rows: int


def choose_banding(similarity: float, recall: float, most_hashes: int) -> Banding:
    """The banding with the most rows, and so the fewest false candidates, that is affordable.

    Args:
        similarity: of pairs that must be found with probability `recall` at least.
        most_hashes: bands * rows at most. One row always fits: more are used if need be.
    """
    best = Banding(1, 1)
    for rows in range(1, most_hashes + 1):
        miss = log1p(-(similarity**rows)) if similarity < 1 else -np.inf
        bands = max(1, ceil(log(1 - recall) / miss - 1e-9))
        if rows > 1 and bands * rows > most_hashes:
            break
        best = Banding(bands, rows)
    return best


def band_keys(texts: Texts, size: int, banding: Banding) -> tuple[np.ndarray, np.ndarray]:
    """A hash of all words, and one for each band: uint64 [bands + 1, texts]; words: int64 [texts].

    A text without words has no shingles, and its keys mean nothing.
    """
    number = len(texts.offsets) - 1
    keys = np.empty((banding.bands + 1, number), np.uint64)
    counts = np.empty(number, np.int64)
    random = np.random.Generator(np.random.PCG64(0))
    functions = random.integers(0, 2**32, (2, banding.bands * banding.rows), np.uint32)
    compiled("shingles").band_keys(
        texts.data, texts.offsets, letter_table(), size,
        functions[0] | np.uint32(1), functions[1], banding.bands, keys, counts,
    )  # fmt: skip
    return keys, counts


def shingle_set(texts: Texts, which: int, size: int) -> np.ndarray:
    """A text's shingles as 64-bit hashes: uint64, sorted, each once.

    Two of a million different shingles share a hash with a probability of 3e-8, so a Jaccard
    similarity of these sets is that of the shingles themselves.
    """
    start, stop = texts.offsets[which : which + 2]
    hashes, _ = compiled("shingles").shingles(texts.data, start, stop, letter_table(), size)
    hashes.sort()
    keep = np.ones(len(hashes), np.bool_)
    keep[1:] = hashes[1:] != hashes[:-1]
    return hashes[keep]
