"""MinHash with banding: which documents may be alike, with a chosen probability to see
it.

Broder, "On the resemblance and containment of documents" (1997): two sets of Jaccard
similarity s have the same minimum under a random hash function with probability s. With
b bands of r such functions, two documents agree in at least one band with probability 1
- (1 - s^r)^b (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4).
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from math import ceil, log, log1p

import numpy as np

from maxlm.corpus.text import ACCENT, WORD, normalize

_SEED = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_CHUNK = 1 << 12  # Shingles that are hashed together.


def choose_banding(
    similarity: float, recall: float, max_hashes: int
) -> tuple[int, int]:
    """Chooses how many bands a signature has, of how many hash functions (rows) each:
    the most rows, and so the fewest false candidates, that are affordable.

    Args:
        similarity: of pairs that must be found with probability `recall` at least.
        max_hashes: bands * rows at most. One row always fits: more are used if need be.
    """
    best = 1, 1
    for rows in range(1, max_hashes + 1):
        miss = log1p(-(similarity**rows)) if similarity < 1 else -np.inf
        bands = max(1, ceil(log(1 - recall) / miss - 1e-9))
        if rows > 1 and bands * rows > max_hashes:
            break
        best = bands, rows
    return best


def mix_bits(values: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser of 64 bits, with shifts by 32: a bijection that spreads
    every bit."""
    values = (values ^ (values >> _HALF)) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> _HALF)) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> _HALF)


@lru_cache(1 << 16)
def _hash_word(word: str) -> int:
    """Hashes a word without case, accents (marks of U+0300..U+036F) and format
    characters.

    A letter counts as its canonical decomposition, so that texts in NFC and in NFD have
    the same words.
    """
    plain = ACCENT.sub("", normalize("NFD", word)).casefold()
    if not plain.isalnum():
        plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    return int.from_bytes(
        hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little"
    )


def hash_words(text: str) -> np.ndarray:
    """Hashes the words of a text: uint64 [words]. See `text.WORD`."""
    return np.array([_hash_word(word) for word in WORD.findall(text)], np.uint64)


def hash_shingles(words: np.ndarray, size: int) -> np.ndarray:
    """Hashes the shingles of a text, one for each place: uint64 [shingles].

    A text of fewer words than `size` has one shingle, of all its words; one without
    words none.
    """
    size = min(size, len(words))
    values = np.full(len(words) - size + 1 if size else 0, _SEED)
    for i in range(size):
        values = (values ^ words[i : i + len(values)]) * _PRIME
    return mix_bits(values)


def make_shingle_set(text: str, size: int) -> np.ndarray:
    """Makes the set of a text's shingles: uint64, sorted, each once.

    Two of a million different shingles share a hash with a probability of 3e-8, so a
    Jaccard similarity of these sets is that of the shingles themselves.
    """
    return np.unique(hash_shingles(hash_words(text), size))


def compute_band_keys(
    sets: Sequence[np.ndarray], banding: tuple[int, int]
) -> np.ndarray:
    """Computes a hash for each band of each text's signature, from its set of shingles,
    uint64 [bands, texts]; see `choose_banding`. Those of a text without shingles mean
    nothing."""
    num_bands, num_rows = banding
    random = np.random.Generator(np.random.PCG64(0))
    functions = random.integers(0, 2**32, (2, num_bands * num_rows), np.uint32)
    factors = functions[0, :, None] | np.uint32(1)
    terms = functions[1, :, None]
    signatures = np.full((len(sets), factors.size), 2**32 - 1, np.uint32)
    for i, each in enumerate(sets):
        shingles = (each >> _HALF).astype(np.uint32)
        for first in range(0, len(shingles), _CHUNK):
            least = (factors * shingles[first : first + _CHUNK] + terms).min(1)
            np.minimum(signatures[i], least, out=signatures[i])
    bands = np.arange(num_bands, dtype=np.uint64)[:, None] ^ _SEED
    rows = signatures.reshape(len(sets), num_bands, num_rows)
    for j in range(num_rows):
        bands = (bands ^ rows[:, :, j].T) * _PRIME
        bands ^= bands >> _HALF
    return mix_bits(bands)
