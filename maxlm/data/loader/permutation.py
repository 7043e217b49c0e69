"""Stateless keyed pseudo-random permutations of range(n): a shuffle nobody has to
store.

A Feistel network (Luby and Rackoff 1988) over the smallest power of two that holds n,
its round function the splitmix64 finaliser (Steele, Lea and Flood 2014), made to fit
any n by cycle walking (Black and Rogaway 2002, "Ciphers with Arbitrary Finite
Domains"). Any index is answered alone, in O(1), so a run can resume anywhere. Not
cryptographic.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

# By chi-square, 8 rounds are fair above 64 values (6 bits); fewer bits mix slowly. The
# number is even, so that halves of unlike widths have their own again at the end.
_ROUNDS = 8
_SMALL_BITS = 6
_SMALL_ROUNDS = 24
# Of splitmix64: what its state grows by, and the factors of its finaliser.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

UInt64s = NDArray[np.uint64]


def derive_key(*parts: int | str) -> int:
    """Derives a 64-bit key from a seed and names, on every machine and process the
    same."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def derive_keys(key: int, indices: ArrayLike) -> UInt64s:
    """Derives one 64-bit key [n] for each index [n] (an epoch, a block) under `key`."""
    # The numbers that splitmix64 draws from the state `key`, by their index.
    num_draws = _as_uint64(indices) + np.uint64(1)
    states = np.uint64(key) + num_draws * _GAMMA
    return _mix(states)


def permute(indices: ArrayLike, n: int, keys: int | UInt64s) -> NDArray[np.int64]:
    """Maps each index [m] < n by the permutation of range(n), n up to 2^62, that `keys`
    chooses. `keys`: one key for all, or an array [m] with one for each index."""
    x = _as_uint64(indices)
    keys = np.broadcast_to(_as_uint64(keys), x.shape)
    # At least one bit in each half, or the network could not mix.
    bits = max(2, (n - 1).bit_length())
    result = _feistel(x, bits, keys)
    # Cycle walking: what falls outside range(n) is permuted again. The domain is less
    # than 2n (n > 2), so half of what is left falls inside at each turn.
    outside = np.flatnonzero(result >= np.uint64(n))
    while outside.size:
        result[outside] = _feistel(result[outside], bits, keys[outside])
        outside = np.flatnonzero(result >= np.uint64(n))
    return result.astype(np.int64)


def _feistel(x: UInt64s, bits: int, keys: UInt64s) -> UInt64s:
    """Maps each x [m] by the permutation of numbers of so many bits that its key [m]
    chooses."""
    right_bits = bits // 2
    left_bits = bits - right_bits
    left = x >> np.uint64(right_bits)
    right = x & _mask(right_bits)
    rounds = _SMALL_ROUNDS if bits <= _SMALL_BITS else _ROUNDS
    for round_number in range(1, rounds + 1):
        # Arrays, not scalars: see `_as_uint64`.
        round_offset = _GAMMA * np.array([round_number], np.uint64)
        round_keys = _mix(keys + round_offset)
        # One half is changed by a function of the other, which stays: so the round can
        # be undone, whatever the function is. Then the halves change places.
        change = _mix(right ^ round_keys) & _mask(left_bits)
        left, right = right, left ^ change
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right


def _mix(x: UInt64s) -> UInt64s:
    """Spreads every bit over all: the finaliser of splitmix64."""
    x = x ^ (x >> np.uint64(30))
    x = x * _MIX_1
    x = x ^ (x >> np.uint64(27))
    x = x * _MIX_2
    return x ^ (x >> np.uint64(31))


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _as_uint64(values: ArrayLike) -> UInt64s:
    # At least 1-d: numpy warns about the wrap-around of scalars, which we mean.
    return np.atleast_1d(np.asarray(values, dtype=np.uint64))
