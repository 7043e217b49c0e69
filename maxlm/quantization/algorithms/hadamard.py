"""Randomised Hadamard transforms of any size (QuIP#, arXiv 2402.04396, section 3).

T = (F ⊗ H ⊗ H ...) S: random signs S, then an orthogonal matrix of few, small factors.
A size n = 2^k · m takes a Hadamard matrix of order 2^j · m for the least j that has one
of Paley's, and Sylvester's for the rest. Where there is none, as for odd n, F is the
cosine transform of order m: orthogonal as well, with entries up to √2 as large as a
Hadamard matrix's.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import isqrt, prod

import jax
import jax.numpy as jnp
import numpy as np

LARGEST_FACTOR = 128
"""Sylvester's matrices are split in factors of at most this order."""


@dataclass(frozen=True)
class HadamardPlan:
    """The factors of an orthogonal matrix of order ``size``."""

    size: int
    core: int
    """The order of the first factor."""
    core_kind: str
    """``"hadamard"``; or ``"cosine"``, where no Hadamard matrix is known here."""
    powers: tuple[int, ...]
    """Orders of the other factors, powers of two."""

    @property
    def factors(self) -> list[np.ndarray]:
        """The factors, fp32, each orthogonal."""
        make = build_hadamard if self.core_kind == "hadamard" else build_cosines
        orders = [(make, self.core), *((build_hadamard, n) for n in self.powers)]
        matrices = [make(order) for make, order in orders]
        return [matrix for matrix in matrices if len(matrix) > 1]


@cache
def plan_hadamard(size: int) -> HadamardPlan:
    """Returns the factors of a transform of ``size`` channels."""
    odd = size
    power = 1
    while odd % 2 == 0:
        odd //= 2
        power *= 2
    core = 1 if odd == 1 else None
    for exponent in range(power.bit_length()):
        if core is None and find_paley(odd * 2**exponent):
            core = odd * 2**exponent
    if core is None:
        return HadamardPlan(size, odd, "cosine", _split_power(power))
    return HadamardPlan(size, core, "hadamard", _split_power(size // core))


def apply_transform(values: jax.Array, signs: jax.Array) -> jax.Array:
    """Returns T x for the vectors x of [..., n], in fp32; signs [n] are ±1."""
    return _apply_factors(values * signs, transpose=False)


def undo_transform(values: jax.Array, signs: jax.Array) -> jax.Array:
    """Returns Tᵀ x, which is T⁻¹ x, for the vectors x of [..., n]."""
    return _apply_factors(values, transpose=True) * signs


def draw_signs(seed: jax.typing.ArrayLike, size: int) -> jax.Array:
    """Returns fp32 [size] of ±1, the same for a seed on every machine and version: a
    bit of MurmurHash3's finalizer of the place."""
    bits = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = bits ^ (jnp.asarray(seed).astype(jnp.uint32) * jnp.uint32(0x85EBCA6B))
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    bits = bits ^ (bits >> 16)
    return 1.0 - 2.0 * (bits & 1).astype(jnp.float32)


def _apply_factors(values: jax.Array, transpose: bool) -> jax.Array:
    size = values.shape[-1]
    factors = plan_hadamard(size).factors
    result = values.astype(jnp.float32)
    after = size
    for factor in factors:
        order = len(factor)
        after //= order
        split = result.reshape(*values.shape[:-1], -1, order, after)
        matrix = factor.T if transpose else factor
        result = jnp.einsum(
            "ij,...bja->...bia", matrix, split, precision=jax.lax.Precision.HIGHEST
        )
    return result.reshape(values.shape)


def _split_power(power: int) -> tuple[int, ...]:
    orders = []
    while power > 1:
        orders.append(min(power, LARGEST_FACTOR))
        power //= orders[-1]
    return tuple(orders)


@cache
def build_hadamard(order: int) -> np.ndarray:
    """Returns an orthogonal fp32 matrix whose entries are all ±1 / √order, for orders
    that are powers of two (Sylvester) or that :func:`find_paley` knows."""
    if order & (order - 1) == 0:
        matrix = np.ones((1, 1))
        while len(matrix) < order:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    else:
        matrix = _build_paley(order)
    return (matrix / np.sqrt(order)).astype(np.float32)


@cache
def build_cosines(order: int) -> np.ndarray:
    """Returns the orthogonal cosine transform (DCT-II), fp32 [order, order]."""
    rows = np.arange(order)[:, None]
    matrix = np.cos(np.pi * rows * (2 * rows.T + 1) / (2 * order))
    matrix *= np.sqrt(np.where(rows == 0, 1, 2) / order)
    return matrix.astype(np.float32)


def find_paley(order: int) -> tuple[int, int, int] | None:
    """Returns (construction, p, k) of Paley's matrix of this order, over the field of
    q = p^k elements: the first, of order q + 1, for q = 3 mod 4; the second, of order
    2 (q + 1), for q = 1 mod 4. None: there is none with k up to 3.

    Source: Paley 1933, On orthogonal matrices.
    """
    for construction, size in ((1, order - 1), (2, order // 2 - 1)):
        if order % construction or size < 3 or size % 4 != (3, 1)[construction - 1]:
            continue
        for exponent in (1, 2, 3):
            prime = round(size ** (1 / exponent))
            if prime**exponent == size and _is_prime(prime):
                return construction, prime, exponent
    return None


def _build_paley(order: int) -> np.ndarray:
    paley = find_paley(order)
    if paley is None:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    construction, prime, exponent = paley
    differences = _tabulate_characters(prime, exponent)
    size = len(differences)
    # [[0, 1ᵀ], [±1, Q]] with the characters Q of differences of the field's elements.
    sign = -1 if construction == 1 else 1
    conference = np.zeros((size + 1, size + 1))
    conference[0, 1:] = 1
    conference[1:, 0] = sign
    conference[1:, 1:] = differences
    identity = np.eye(size + 1)
    if construction == 1:
        return conference + identity
    pair = np.array([[1, 1], [1, -1]])
    diagonal = np.array([[1, -1], [-1, -1]])
    return np.kron(conference, pair) + np.kron(identity, diagonal)


def _tabulate_characters(prime: int, exponent: int) -> np.ndarray:
    """Returns [q, q] of the field of q = prime^exponent elements: 1 where the
    difference of two elements is a square, -1 where it is none, 0 where it is zero."""
    elements = list(product(range(prime), repeat=exponent))
    modulus = _find_irreducible(prime, exponent)
    squares = {_square(element, modulus, prime) for element in elements}
    places = np.array(elements)
    powers = prime ** np.arange(exponent)
    is_square = np.full(prime**exponent, -1)
    for square in squares:
        is_square[np.dot(square, powers)] = 1
    is_square[0] = 0
    differences = (places[:, None] - places[None]) % prime
    return is_square[differences @ powers]


def _square(
    element: tuple[int, ...], modulus: tuple[int, ...], prime: int
) -> tuple[int, ...]:
    """Returns the square of a polynomial, lowest power first, modulo x^k + modulus."""
    length = len(element)
    result = np.convolve(element, element)
    for power in range(len(result) - 1, length - 1, -1):
        result[power - length : power] -= result[power] * np.array(modulus)
    return tuple(int(value) for value in result[:length] % prime)


def _find_irreducible(prime: int, exponent: int) -> tuple[int, ...]:
    """Returns the low coefficients of an irreducible x^k + ..., lowest power first. Up
    to the third degree a polynomial without roots is one."""
    roots = np.arange(prime)
    for modulus in product(range(prime), repeat=exponent):
        values = roots**exponent
        for power, coefficient in enumerate(modulus):
            values = values + coefficient * roots**power
        if exponent == 1 or (values % prime != 0).all():
            return modulus
    raise ValueError(f"no polynomial of degree {exponent} over {prime}")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % part for part in range(2, isqrt(number) + 1))


def describe_transform(size: int) -> str:
    """Returns the factors of a transform in words: ``36 (Paley) x 16``."""
    plan = plan_hadamard(size)
    name = "cosines" if plan.core_kind == "cosine" else "Paley"
    core = [f"{plan.core} ({name})"] if plan.core > 1 else []
    text = " x ".join([*core, *map(str, plan.powers)])
    assert prod((plan.core, *plan.powers)) == size
    return text or "1"
