"""Position schemes are what their papers say, in float64 and by other formulas than the
code has. That queries, keys and scores get them is checked in whole models
(test_decoder.py)."""

from math import log, pi

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.layers.positions import (
    PositionsConfig,
    compute_alibi_slopes,
    compute_relative_buckets,
)
from maxlm.models.layers.rope import (
    DynamicNtkScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    ProportionalScaling,
    Rotary,
    YarnScaling,
    compute_frequencies,
    compute_rotary,
    rope_attention_factor,
)
from tests.models import reference

THETAS, SIZES, FACTORS = (1e4, 5e5), (6, 64, 128), (1.0, 2.5, 8.0)
SHAPES = [(theta, size) for theta in THETAS for size in SIZES]


def plain(theta, size):
    """Su et al. 2021, §3.2.2, pair after pair."""
    return np.array([theta ** (-2 * i / size) for i in range(size // 2)])


def close(actual, expected, rtol=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=rtol)


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize(("theta", "size"), SHAPES)
def test_frequencies_fall_geometrically_and_are_scaled_as_a_whole(theta, size, factor):
    """NTK's new base is that of a geometric sequence, the ends of which are known: the
    first stays, the last is divided."""
    unscaled = plain(theta, size)
    close(compute_frequencies(theta, size), unscaled)
    dynamic = DynamicNtkScaling(factor=factor, original_length=32)
    close(compute_frequencies(theta, size, dynamic), unscaled)
    close(
        compute_frequencies(theta, size, LinearScaling(factor=factor)),
        unscaled / factor,
    )
    pairs = np.arange(size // 2) / (size // 2 - 1)
    expected = (unscaled[-1] / factor) ** pairs
    close(compute_frequencies(theta, size, NtkScaling(factor=factor)), expected)


def yarn(theta, size, scaling):
    """In turns a pair makes in the original length, r = L / λ. Where it is more than
    beta_fast it stays, where it is less than beta_slow it is divided (Peng et al. 2023,
    eq. 17 and 18). Between, as in the published code, the ramp is even in the pair's
    number, that is in log r."""
    unscaled = plain(theta, size)
    scaled = np.empty_like(unscaled)
    fast, slow = scaling.beta_fast, scaling.beta_slow

    def turns(pair):
        return scaling.original_length * theta ** (-2 * pair / size) / (2 * pi)

    # Pairs of which the one still turns so often, and the other so seldom; there may be
    # none such in a head, so that the sequence is thought on at both ends.
    pairs = range(-3 * size, 4 * size)
    first = max(max(i for i in pairs if turns(i) >= fast), 0)
    last = min(min(i for i in pairs if turns(i) <= slow), size - 1)
    for i, frequency in enumerate(unscaled):
        if scaling.truncate:
            share = (i - first) / (last - first)
        else:
            share = log(fast / turns(i)) / log(fast / slow)
        unchanged = 1 - min(max(share, 0), 1)
        scaled[i] = frequency * unchanged + frequency / scaling.factor * (1 - unchanged)
    return scaled


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("betas", [(32.0, 1.0), (8.0, 2.0)])
@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("theta", THETAS)
def test_yarn_stretches_slow_pairs_alone_with_a_ramp_between(
    theta, length, betas, truncate
):
    scaling = YarnScaling(
        factor=8.0,
        original_length=length,
        beta_fast=betas[0],
        beta_slow=betas[1],
        truncate=truncate,
    )
    scaled = compute_frequencies(theta, 128, scaling)
    close(scaled, yarn(theta, 128, scaling))
    unscaled = plain(theta, 128)
    turns = length * unscaled / (2 * pi)
    # Whole dimensions move the ramp's ends by less than one pair.
    pair = theta ** (2 / 128) if truncate else 1
    close(scaled[turns > betas[0] * pair], unscaled[turns > betas[0] * pair])
    close(scaled[turns < betas[1] / pair], unscaled[turns < betas[1] / pair] / 8)
    between = (turns < betas[0] / pair) & (turns > betas[1] * pair)
    assert between.any()
    assert ((scaled < unscaled) & (scaled > unscaled / 8))[between].all()


def test_yarn_ramps_begin_and_end_at_a_pair_that_there_is():
    """In 200 tokens no pair turns 32 times: the ramp begins at the first. Where even
    the slowest pair turns it would end at the 8th, and does at the 7th, the head's last
    dimension."""
    scaling = YarnScaling(factor=8.0, original_length=200)
    scaled = compute_frequencies(1e4, 128, scaling)
    close(scaled, yarn(1e4, 128, scaling))
    assert scaled[0] == 1
    assert (scaled[1:] < plain(1e4, 128)[1:]).all()

    scaling = YarnScaling(factor=8.0, original_length=10**8, beta_fast=1e6)
    scaled = compute_frequencies(1e4, 8, scaling)
    unscaled = plain(1e4, 8)
    close(scaled, yarn(1e4, 8, scaling))
    unchanged = 1 - np.array([0, 0, 1, 2]) / 6
    close(scaled, unscaled * unchanged + unscaled / 8 * (1 - unchanged))


@pytest.mark.parametrize("theta", THETAS)
def test_llama3_has_three_regimes_that_meet(theta):
    """Its published code: by wavelength, below L / high, above L / low, and between."""
    scaling = Llama3Scaling(factor=8.0, original_length=8192)
    unscaled = plain(theta, 128)
    scaled = compute_frequencies(theta, 128, scaling)
    counts = {"short": 0, "long": 0, "between": 0}
    for frequency, got in zip(unscaled, scaled, strict=True):
        wavelength = 2 * pi / frequency
        if wavelength < 8192 / 4.0:
            expected = frequency
            regime = "short"
        elif wavelength > 8192 / 1.0:
            expected = frequency / 8.0
            regime = "long"
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * frequency / 8.0 + smooth * frequency
            regime = "between"
        assert got == pytest.approx(expected, rel=1e-12)
        counts[regime] += 1
    assert min(counts.values()) > 5


def angles(positions, turns):
    return np.asarray(positions, np.float64)[..., None] * turns


def assert_turned(rotary: Rotary, expected, scale=1.0):
    """``expected``: angles [B, S, R/2]."""
    np.testing.assert_allclose(
        rotary.cos[..., 0, :], scale * np.cos(expected), atol=1e-4
    )
    np.testing.assert_allclose(
        rotary.sin[..., 0, :], scale * np.sin(expected), atol=1e-4
    )


@pytest.mark.parametrize("theta", THETAS)
def test_dynamic_scaling_is_none_up_to_the_original_length_and_ntk_beyond(theta):
    """By each row's own last position (Peng et al. 2023, §3.3); the third is one token
    too long."""
    scaling = DynamicNtkScaling(factor=4.0, original_length=10)
    lengths = 5, 10, 11, 37
    rows = np.array([[*range(n), *[0] * (37 - n)] for n in lengths], np.int32)
    rotary = compute_rotary(jnp.asarray(rows), 16, theta, scaling)
    for row, n in enumerate(lengths):
        factor = max(1.0, 4.0 * n / 10 - 3.0)
        base = theta * factor ** (16 / 14)
        row_rotary = Rotary(rotary.cos[row : row + 1], rotary.sin[row : row + 1])
        assert_turned(row_rotary, angles(rows[row : row + 1], plain(base, 16)))
        if n <= 10:
            same = compute_rotary(jnp.asarray(rows[row : row + 1]), 16, theta)
            np.testing.assert_allclose(row_rotary.cos, same.cos, atol=1e-6)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 1.0),
        (LinearScaling(factor=8.0), 1.0),
        (NtkScaling(factor=8.0), 1.0),
        (DynamicNtkScaling(factor=8.0, original_length=64), 1.0),
        (Llama3Scaling(factor=8.0, original_length=64), 1.0),
        (YarnScaling(factor=8.0, original_length=64), 0.1 * log(8) + 1),
        (YarnScaling(factor=1.0, original_length=64), 1.0),
        (YarnScaling(factor=8.0, original_length=64, attention_factor=0.7), 0.7),
        # DeepSeek-V2's are equal, and cancel here.
        (
            YarnScaling(
                factor=40.0, original_length=64, mscale=0.707, mscale_all_dim=0.707
            ),
            1.0,
        ),
        (
            YarnScaling(
                factor=40.0, original_length=64, mscale=1.0, mscale_all_dim=0.5
            ),
            (0.1 * log(40) + 1) / (0.05 * log(40) + 1),
        ),
    ],
)
def test_yarn_alone_changes_the_size_of_what_is_turned(scaling, expected):
    assert rope_attention_factor(scaling) == pytest.approx(expected, rel=1e-12)
    rotary = compute_rotary(jnp.arange(9, dtype=jnp.int32)[None], 8, 1e4, scaling)
    np.testing.assert_allclose(rotary.cos**2 + rotary.sin**2, expected**2, rtol=1e-5)


SHORT = (1.0, 1.5, 4.0)
LONG = (2.0, 3.0, 50.0)
LONGROPE = LongRopeScaling(
    factor=4.0, original_length=8, short_factors=SHORT, long_factors=LONG
)


def test_longrope_divides_by_one_list_or_the_other_row_by_row():
    """Rows of 8 and of 9 positions, of which 8 is the original length; and one of two
    documents, of 8 and of 3 tokens."""
    positions = np.array([[*range(8), 0], [*range(9)], [*range(6), *range(3)]])
    rotary = compute_rotary(jnp.asarray(positions), 6, 100.0, LONGROPE)
    factor = np.sqrt(1 + np.log(4) / np.log(8))
    for row, factors in enumerate((SHORT, LONG, SHORT)):
        angles = positions[row][:, None] * plain(100.0, 6) / factors
        close(rotary.cos[row, :, 0], factor * np.cos(angles), rtol=1e-5)
    with pytest.raises(MaxlmError, match="3 factors of longrope for 8 dimensions"):
        compute_rotary(jnp.asarray(positions), 8, 100.0, LONGROPE)


def test_small_models_turn_by_as_many_of_longrope_s_factors_as_they_have_pairs():
    model = DecoderConfig.model_validate(
        {
            "vocab_size": 9,
            "num_layers": 1,
            "d_model": 6,
            "max_seq_len": 32,
            "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            "mlp": {"d_ff": 4},
            "positions": {"rotary_dim": 6, "scaling": LONGROPE.model_dump()},
        }
    )
    small = model.shrunk(vocab_size=9, num_layers=1, head_dim=16, seq_len=16)
    assert small.positions.rotary_dim == 12
    scaling = small.positions.scaling
    assert isinstance(scaling, LongRopeScaling)
    assert scaling.long_factors == (2.0, 2.0, 3.0, 3.0, 50.0, 50.0)


def test_proportional_rope_leaves_the_slowest_pairs_as_they_are():
    scaling = ProportionalScaling(share=0.4, factor=2.0)
    expected = plain(1e4, 18) / 2
    expected[3:] = 0  # of 9 pairs, 0.4 are three whole ones
    close(compute_frequencies(1e4, 18, scaling), expected)


def test_alibi_slopes_are_the_published_ones():
    """Press et al. 2022, §3; those of 12 heads are of 8, and the first of 16 that 8 do
    not have. The smallest can be given, as by MPT's alibi_bias_max."""
    close(compute_alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
    close(compute_alibi_slopes(12)[8:], 2.0 ** -np.arange(0.5, 4), rtol=1e-6)
    close(compute_alibi_slopes(4, 6.0), [2**-1.5, 2**-3, 2**-4.5, 2**-6], rtol=1e-6)


@given(st.integers(1, 130))
def test_alibi_slopes_equal_the_reference_and_differ(heads):
    slopes = compute_alibi_slopes(heads)
    close(
        slopes, [reference.alibi_slope(head, heads) for head in range(heads)], rtol=1e-6
    )
    assert len(set(slopes.tolist())) == heads
    assert slopes.dtype == np.float32


def buckets_of(config, causal):
    """By distance query − key, from max_distance on this side to as far on the
    other."""
    at = compute_relative_buckets(config, causal=causal)
    reach = config.max_distance
    assert at.shape == (2 * reach + 1,)
    return {distance: at[reach - distance] for distance in range(-reach, reach + 1)}


@given(half=st.integers(2, 20), reach=st.integers(2, 300), causal=st.booleans())
def test_buckets_grow_with_distance_on_each_side(half, reach, causal):
    per_side = 2 * half if causal else half
    exact = per_side // 2
    assume(reach > half)
    config = PositionsConfig(kind="relative", buckets=2 * half, max_distance=reach)
    buckets = buckets_of(config, causal)
    ahead = 0 if causal else half
    behind = [buckets[d] for d in range(reach + 1)]
    before = [buckets[-d] - ahead for d in range(1, reach + 1)]
    assert behind == sorted(behind)
    assert before == ([0] * reach if causal else behind[1:])
    assert behind[:exact] == list(range(exact))
    assert behind[reach] == per_side - 1
    for distance, bucket in enumerate(behind):
        expected = reference.relative_bucket(distance, per_side, reach, True)
        if (
            bucket != expected
        ):  # fp32 may take a distance on a border for one just below it
            power = distance ** (per_side - exact)
            k = expected - exact
            assert power == reach**k * exact ** (per_side - exact - k)
            assert bucket == expected - 1
