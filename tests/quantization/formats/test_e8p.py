"""E8P against its definition and a search through all points."""

import jax
import numpy as np
import pytest

from maxlm.quantization.formats.e8p import decode_vectors, encode_vectors


@pytest.fixture(scope="module")
def points():
    return np.asarray(jax.jit(decode_vectors)(np.arange(2**16, dtype=np.uint16)))


def test_points_are_of_the_lattice(points):
    assert len(np.unique(points, axis=0)) == 2**16
    shifts = []
    for shift in (0.25, -0.25):
        centred = points - shift
        # Eight odd halves of an even sum: the second coset of E8.
        is_half = (centred % 1 == 0.5).all(-1)
        shifts.append(is_half & (centred.sum(-1) % 2 == 0))
        # All of squared length at most 10, and 29 patterns of length 12.
        lengths = np.square(centred[shifts[-1]]).sum(-1)
        lengths, counts = np.unique(lengths, return_counts=True)
        assert lengths.tolist() == [2, 4, 6, 8, 10, 12]
        assert counts[-1] == 29 * 2**7
    assert (shifts[0] ^ shifts[1]).all()


def test_codes_are_quip_sharps(points):
    # Worked by hand from the code book of QuIP#'s implementation. Pattern 0 is eight
    # halves; bit 4 is the sign of the second number. An odd number of sign bits is a
    # shift down, and turns bit 0 over. The pattern of 5/2 last has an odd sum.
    np.testing.assert_array_equal(points[0], np.full(8, 0.75))
    signs = np.array([-1, -1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(points[0b10000], signs / 2 - 0.25)
    np.testing.assert_array_equal(points[0b10001], signs / 2 + 0.25)
    last = np.array([0.5] * 7 + [1.5])
    np.testing.assert_array_equal(points[1 << 8], last * ([1] * 7 + [-1]) + 0.25)
    # The first and the last pattern of length 12.
    threes = np.array([3, 1, 1, 1, 3, 3, 3, 3]) / 2
    np.testing.assert_array_equal(np.abs(points[227 << 8] - 0.25), threes)
    threes = np.array([3, 3, 1, 1, 3, 3, 3, 1]) / 2
    np.testing.assert_array_equal(np.abs(points[255 << 8] - 0.25), threes)


def test_nearest_point(points):
    vectors = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    # Also far outside, where every point is far.
    vectors[20:] *= 3
    codes = np.asarray(jax.jit(encode_vectors)(vectors))
    wide = points.astype(np.float64)
    distances = np.square(wide).sum(-1) - 2 * vectors @ wide.T
    np.testing.assert_array_equal(codes, distances.argmin(-1))


@pytest.mark.more
def test_points_are_their_own_nearest(points):
    codes = np.arange(0, 2**16, 5, dtype=np.uint16)
    np.testing.assert_array_equal(jax.jit(encode_vectors)(points[codes]), codes)
