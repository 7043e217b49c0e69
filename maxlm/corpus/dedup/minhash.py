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
from typing import NamedTuple

import numpy as np

from maxlm.corpus.text import ACCENT, WORD, normalize_unicode

# FNV's offset of 64 bits, and 2^64 divided by the golden ratio, which is odd. Keys and
# sets of shingles lie in files: other numbers here would make new versions of stages.
_SEED = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_HALF_BITS = np.uint64(32)
_CHUNK = 1 << 12  # Shingles that are hashed together.


class Banding(NamedTuple):
    """How the hash functions of a MinHash signature are grouped."""

    num_bands: int
    num_rows: int
    """Hash functions of each band."""


def choose_banding(similarity: float, recall: float, max_hashes: int) -> Banding:
    """Chooses the banding with the most rows, and so the fewest false candidates, that
    is affordable.

    Args:
        similarity: of pairs that must be found with probability `recall` at least.
        max_hashes: bands * rows at most; bands of one row are taken however many they
            are.
    """
    best = Banding(num_bands=1, num_rows=1)
    for rows in range(1, max_hashes + 1):
        # Smallest b with (1 - s^r)^b <= 1 - recall. The logarithm of the base is that of
        # the probability that one band misses a pair.
        log_miss = -np.inf
        if similarity < 1:
            log_miss = log1p(-(similarity**rows))
        # Less a rounding error, which must not make it one more.
        bands = max(1, ceil(log(1 - recall) / log_miss - 1e-9))
        if rows > 1 and bands * rows > max_hashes:
            break
        best = Banding(bands, rows)
    return best


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Spreads every bit of numbers over all: a bijection of uint64, MurmurHash3's
    finaliser of 64 bits with shifts by 32."""
    values = values ^ (values >> _HALF_BITS)
    values = values * np.uint64(0xFF51AFD7ED558CCD)
    values = values ^ (values >> _HALF_BITS)
    values = values * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> _HALF_BITS)


@lru_cache(1 << 16)
def _hash_word(word: str) -> int:
    """Hashes a word without case, accents (marks of U+0300..U+036F) and format
    characters.

    A letter counts as its canonical decomposition, so that texts in NFC and in NFD have
    the same words.
    """
    plain = ACCENT.sub("", normalize_unicode("NFD", word)).casefold()
    if not plain.isalnum():
        plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    digest = hashlib.blake2b(plain.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def hash_words(text: str) -> np.ndarray:
    """Hashes the words of a text: uint64 [words]. See `text.WORD`."""
    return np.array([_hash_word(word) for word in WORD.findall(text)], np.uint64)


def hash_shingles(words: np.ndarray, size: int) -> np.ndarray:
    """Hashes the shingles of a text, one for each place: uint64 [shingles].

    A text of fewer words than `size` has one shingle, of all its words; one without
    words none.
    """
    size = min(size, len(words))
    num_shingles = 0
    if size:
        num_shingles = len(words) - size + 1
    # FNV-1a over the words' hashes, of all shingles at once.
    hashes = np.full(num_shingles, _SEED)
    for i in range(size):
        hashes = (hashes ^ words[i : i + num_shingles]) * _PRIME
    return mix_bits(hashes)


def make_shingle_set(text: str, size: int) -> np.ndarray:
    """Makes the set of a text's shingles: uint64, sorted, each once.

    Two of a million different shingles share a hash with a probability of 3e-8, so a
    Jaccard similarity of these sets is that of the shingles themselves.
    """
    return np.unique(hash_shingles(hash_words(text), size))


def compute_band_keys(sets: Sequence[np.ndarray], banding: Banding) -> np.ndarray:
    """Computes a hash for each band of each text's signature, from its set of shingles:
    uint64 [bands, texts]. Those of a text without shingles mean nothing."""
    num_bands, num_rows = banding
    num_functions = num_bands * num_rows
    # The hash functions are factor * shingle + term modulo 2^32. They must be the same
    # in every run: keys lie in files.
    random = np.random.Generator(np.random.PCG64(0))
    functions = random.integers(0, 2**32, (2, num_functions), np.uint32)
    factors = functions[0, :, None] | np.uint32(1)  # Odd, and so a bijection.
    terms = functions[1, :, None]

    # The least hash of each text's shingles under each function: [texts, functions].
    signatures = np.full((len(sets), num_functions), 2**32 - 1, np.uint32)
    for signature, shingle_set in zip(signatures, sets, strict=True):
        shingles = (shingle_set >> _HALF_BITS).astype(np.uint32)
        for first in range(0, len(shingles), _CHUNK):
            chunk = shingles[first : first + _CHUNK]
            hashes = factors * chunk + terms  # [functions, chunk]
            np.minimum(signature, hashes.min(axis=1), out=signature)

    # FNV-1a over the rows of each band, with a seed for each band.
    keys = np.arange(num_bands, dtype=np.uint64)[:, None] ^ _SEED
    rows = signatures.reshape(len(sets), num_bands, num_rows)
    for row in range(num_rows):
        keys = (keys ^ rows[:, :, row].T) * _PRIME
        keys ^= keys >> _HALF_BITS
    return mix_bits(keys)
