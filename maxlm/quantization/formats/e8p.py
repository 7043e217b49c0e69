"""E8P: eight numbers as one of 65,536 points of the lattice E8, two bits a number (Tseng
et al. 2024, "QuIP#", arXiv 2402.04396, section 4.2).

A point is an absolute pattern of eight odd halves, signs whose product gives the pattern
an even sum, and a shift of all eight by +1/4 or -1/4. Of the 256 patterns 227 are those
of squared length at most 10 that an even sum allows, and 29 have squared length 12.

Codes are numbered as in QuIP#'s implementation: the pattern in the high byte; in the low
byte bit ``SIGN_BITS[i]`` says that number i is negated; an odd number of these bits says
that the shift is -1/4 and that bit 0 is to be read inverted. Where a pattern's sum is
odd, its last number is negative from the start.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from maxlm.quantization.formats.blocks import check_whole_blocks
from maxlm.quantization.formats.format import Format, Planes, PlaneSpec
from maxlm.quantization.formats.names import build_name_error

VECTOR = 8
"""Numbers that share a code."""

SHIFT = 0.25

BEST_DEVIATION = 1.03
"""The standard deviation at which normal numbers have the least error (QuIP#'s
implementation; :func:`encode_vectors` on 1e6 of them)."""

SIGN_BITS = (0, 4, 1, 5, 2, 6, 3, 7)
"""The bit of each number's sign in a code."""

_LONGEST_SQUARE = 10

# Of the patterns of squared length 12, five 3/2 and three 1/2 each, the positions of
# the 1/2 in those that fill the code book up to 256, in QuIP#'s order.
_PADDING_POSITIONS = (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245"
    " 167 157 147 156 146 045 067 057 047 056 046 014 237"
)

_VECTORS_AT_ONCE = 8192
"""Vectors whose distances to all patterns are in memory at once."""


@dataclass(frozen=True)
class E8pFormat(Format):
    """E8P with one scale a matrix, by which its numbers' root mean square becomes 1.03.

    Planes: ``codes`` uint16 [R, C / 8]; ``scales`` fp32 [1, 1].
    """

    @property
    def name(self) -> str:
        return "e8p"

    @property
    def block_shape(self) -> tuple[int, int]:
        return 1, VECTOR

    def describe_planes(self, rows: int, columns: int) -> dict[str, PlaneSpec]:
        check_whole_blocks(self.name, rows, columns, VECTOR)
        return {
            "codes": PlaneSpec(rows, columns // VECTOR, "uint16"),
            "scales": PlaneSpec(1, 1, "float32"),
        }

    def encode(self, values: jax.Array) -> Planes:
        rows, columns = values.shape[-2:]
        self.describe_planes(rows, columns)
        values = values.astype(jnp.float32)
        scales = self.compute_scales(values)
        divisors = jnp.where(scales == 0, 1, scales)
        vectors = (values / divisors).reshape(*values.shape[:-1], -1, VECTOR)
        return {"codes": encode_vectors(vectors), "scales": scales}

    def decode(self, planes: Planes, dtype: DTypeLike = jnp.float32) -> jax.Array:
        codes = planes["codes"]
        vectors = decode_vectors(codes)
        values = vectors.reshape(*codes.shape[:-1], codes.shape[-1] * VECTOR)
        return (values * planes["scales"]).astype(dtype)

    def compute_scales(self, values: jax.Array) -> jax.Array:
        """Returns the fp32 scales [..., 1, 1] of matrices [..., R, C]."""
        mean_square = jnp.square(values).mean((-2, -1), keepdims=True)
        return jnp.sqrt(mean_square) / BEST_DEVIATION


@cache
def list_patterns() -> np.ndarray:
    """Returns the fp32 absolute patterns [256, 8], in the order of the codes."""
    halves = (0.5, 1.5, 2.5)
    short = []
    for pattern in product(halves, repeat=VECTOR):
        # Any pattern can have an even sum: its signs are free up to their product.
        if sum(number**2 for number in pattern) <= _LONGEST_SQUARE:
            short.append(pattern)
    long = []
    for positions in _PADDING_POSITIONS.split():
        ones = {int(position) for position in positions}
        long.append([0.5 if place in ones else 1.5 for place in range(VECTOR)])
    return np.asarray([*short, *long], np.float32)


def encode_vectors(vectors: jax.Array) -> jax.Array:
    """Returns the uint16 codes [...] of the points nearest to fp32 vectors [..., 8]."""
    flat = vectors.reshape(-1, VECTOR)
    codes = jax.lax.map(_encode_vector, flat, batch_size=_VECTORS_AT_ONCE)
    return codes.reshape(vectors.shape[:-1])


def decode_vectors(codes: jax.Array) -> jax.Array:
    """Returns the fp32 points [..., 8] of uint16 codes [...]."""
    codes = codes.astype(jnp.int32)
    patterns = jnp.asarray(list_patterns())[codes >> 8]
    signs = codes & 0xFF
    is_odd = jax.lax.population_count(signs) & 1
    signs = signs ^ is_odd
    last_is_negative = _find_odd_sums()[codes >> 8]
    is_negative = (signs[..., None] >> jnp.asarray(SIGN_BITS)) & 1
    is_negative = is_negative.at[..., -1].set(
        is_negative[..., -1] ^ last_is_negative.astype(jnp.int32)
    )
    points = jnp.where(is_negative == 1, -patterns, patterns)
    return points + jnp.where(is_odd == 1, -SHIFT, SHIFT)[..., None]


def _find_odd_sums() -> jax.Array:
    """Returns which patterns have an odd sum [256]."""
    return jnp.asarray(list_patterns().sum(-1) % 2 == 1)


def _encode_vector(vector: jax.Array) -> jax.Array:
    """Returns the uint16 code of the point nearest to a vector [8]."""
    candidates = [_find_nearest(vector, SHIFT), _find_nearest(vector, -SHIFT)]
    (raised, raised_distance), (lowered, lowered_distance) = candidates
    # The shift is in the parity of the signs' byte: flipping bit 0 makes it odd.
    lowered = lowered ^ 1
    nearest = jnp.where(lowered_distance < raised_distance, lowered, raised)
    return nearest.astype(jnp.uint16)


def _find_nearest(vector: jax.Array, shift: float) -> tuple[jax.Array, jax.Array]:
    """Returns the nearest point of one shift: pattern and even signs, and the squared
    distance less that of the vector itself from the shift."""
    patterns = list_patterns()
    centred = vector - shift
    magnitudes = jnp.abs(centred)
    is_negative = centred < 0
    # The squared distance to pattern a with the vector's own signs is |y|² + |a|² -
    # 2 Σ |y_i| a_i. Signs of the wrong product are put right where it costs least:
    # 4 min |y_i| a_i.
    distances = jnp.asarray((patterns**2).sum(-1))
    cheapest = jnp.full(len(patterns), jnp.inf, jnp.float32)
    for place in range(VECTOR):
        overlap = magnitudes[place] * patterns[:, place]
        distances -= 2 * overlap
        cheapest = jnp.minimum(cheapest, overlap)
    is_wrong = (is_negative.sum() & 1) != _find_odd_sums()
    distances += jnp.where(is_wrong, 4 * cheapest, 0)
    nearest = jnp.argmin(distances)
    pattern = jnp.asarray(patterns)[nearest]
    flipped = jnp.argmin(magnitudes * pattern)
    flips = is_wrong[nearest] & (jnp.arange(VECTOR) == flipped)
    negated = is_negative ^ flips
    # The last number of an odd pattern is negative without its bit.
    starts_negative = _find_odd_sums()[nearest] & (jnp.arange(VECTOR) == VECTOR - 1)
    bits = (negated ^ starts_negative).astype(jnp.int32) << jnp.asarray(SIGN_BITS)
    code = (nearest.astype(jnp.int32) << 8) | bits.sum()
    return code, distances[nearest] + jnp.square(centred).sum()


def read_e8p_format(name: str) -> E8pFormat:
    """Returns the format of the name ``e8p``. Raises MaxlmError: another."""
    if name != "e8p":
        raise build_name_error(name, ["e8p"])
    return E8pFormat()
