"""Attentions of every kind, drawn at random, and what any implementation must make of
them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from pallas_kernels.attention import compute_row_delta, sink_gradient
from pallas_kernels.attention.params import AttentionOptions
from tests.models.building import QUICK
from tests.pallas_kernels import reference

# What stands in the keys and values that no query sees: finite, and its products
# overflow.
GARBAGE = 3e38
# Of a result to bf16, relative: half a unit in the last place.
ROUNDING = 2.0**-9
PLACES = ("default", "static", "traced", "positions")


class Case(NamedTuple):
    """One attention; arrays follow from ``seed``."""

    shape: tuple[int, ...]
    """B, S, T, N, K, H, Hv."""
    dtype: str = "float32"
    causal: bool = True
    window: int | None = None
    prefix: bool = False
    packed: bool = False
    soft_cap: float | None = None
    slopes: bool = False
    sinks: bool = False
    reach: int | None = None
    """Distance from which on biases are alike; None: there are none."""
    place: str = "default"
    """How positions are given: one of ``PLACES``."""
    seed: int = 0

    def arrays(self) -> tuple[list[np.ndarray], np.ndarray]:
        """q, k, v and the output's cotangent, in ``dtype``."""
        B, S, T, N, K, H, Hv = self.shape
        q, k, v = reference.operands(B, S, T, N, K, H, self.seed, Hv)
        d_o = np.random.default_rng(self.seed + 1).standard_normal((B, S, N, Hv))
        q, k, v, d_o = (x.astype(jnp.dtype(self.dtype)) for x in (2 * q, k, v, d_o))
        return [q, k, v], d_o

    def options(self) -> dict[str, Any]:
        """Of ``attention``."""
        B, S, T, N, *_ = self.shape
        rng = np.random.default_rng(self.seed + 2)
        chosen: dict[str, Any] = {
            "causal": self.causal,
            "scale": 0.7 * self.shape[5] ** -0.5,
        }
        if self.window is not None:
            chosen["window"] = self.window
        if self.soft_cap is not None:
            chosen["soft_cap"] = self.soft_cap
        if self.packed:
            q_segments, k_segments = (
                reference.packed(rng, B, length) for length in (S, T)
            )
            chosen["segment_ids"] = q_segments, q_segments if S == T else k_segments
        if self.slopes:
            chosen["slopes"] = (2.0 ** -rng.uniform(0, 6, N)).astype(np.float32)
        if self.sinks:
            chosen["sinks"] = rng.normal(0, 2, N).astype(np.float32)
        first, second = (int(x) for x in rng.integers(0, max(S, T) + 1, 2))
        if self.place == "static":
            chosen |= {"q_offset": first, "k_offset": second}
        elif self.place == "traced":
            chosen |= {
                "q_offset": np.array(first, np.int32),
                "k_offset": np.array(second, np.int32),
            }
        elif self.place == "positions":
            chosen["q_positions"] = rng.integers(0, T + 3, (B, S)).astype(np.int32)
            chosen["k_positions"] = rng.permutation(T).astype(np.int32)[None]
        if self.prefix:
            # Counted as positions are, up to and past the last key's.
            least = second if self.place in ("static", "traced") else 0
            chosen["prefix"] = (least + rng.integers(0, T + 2, B)).astype(np.int32)
        if self.reach is not None:
            chosen["biases"] = rng.normal(0, 2, (N, 2 * self.reach + 1)).astype(
                np.float32
            )
        return chosen


def cases(
    lengths: tuple[int, ...] = (1, 3, 7, 64, 127, 128, 129, 200, 256),
    heads: tuple[tuple[int, int], ...] = ((1, 1), (2, 2), (4, 2), (6, 2), (3, 1)),
    head_sizes: tuple[tuple[int, int], ...] = ((1, 1), (4, 4), (9, 9), (8, 5), (3, 12)),
    dtypes: tuple[str, ...] = ("float32", "float32", "bfloat16"),
    places: tuple[str, ...] = PLACES,
    reaches: tuple[int | None, ...] = (None,),
) -> st.SearchStrategy[Case]:
    """Every combination of features.

    Args:
        lengths: of queries and of keys, equal or not.
        heads: N and K.
        head_sizes: H and Hv.
        places: how positions may be given.
        reaches: of biases, which only XLA has.
    """

    @st.composite
    def draw_case(draw: Any) -> Case:
        S = draw(st.sampled_from(lengths))
        T = draw(st.just(S) | st.sampled_from(lengths))
        causal = draw(st.booleans() | st.just(True))
        windows = st.none() | st.sampled_from((1, 2, 5, 100, 127, 128, 400))
        return Case(
            shape=(
                draw(st.integers(1, 2)),
                S,
                T,
                *draw(st.sampled_from(heads)),
                *draw(st.sampled_from(head_sizes)),
            ),
            dtype=draw(st.sampled_from(dtypes)),
            causal=causal,
            window=draw(windows) if causal else None,
            prefix=causal and draw(st.booleans()),
            packed=draw(st.booleans()),
            soft_cap=draw(st.none() | st.sampled_from((0.5, 3.0, 50.0))),
            slopes=draw(st.booleans()),
            sinks=draw(st.booleans()),
            place=draw(st.sampled_from(places)),
            seed=draw(st.integers(0, 999)),
            reach=draw(st.sampled_from(reaches)),
        )

    return draw_case()


Forward = Callable[..., tuple[jax.Array, jax.Array]]
"""(q, k, v, **options) → o, lse, as ``attention_forward``."""
Backward = Callable[..., tuple[jax.Array, ...]]
"""(q, k, v, lse, delta, d_o, **options) → dQ, dK, dV and the biases', as
``attention_backward``."""


def check(
    forward: Forward,
    backward: Backward,
    case: Case,
    tolerance: float = 1e-5,
    rounding: float = ROUNDING,
    lse_rounding: float = 0.0,
) -> None:
    """An implementation's results are the reference's, and nothing masked leaks into
    them.

    In fp32 to ``tolerance`` of the largest element (or of 1). In bf16 with no more than
    1.5 times the error of plain attention, root mean square, and ``rounding`` besides:
    0 where there are enough elements that chance has no say. Log-sum-exps are as exact
    as in fp32 there too, but for ``lse_rounding``.
    """
    (q, k, v), d_o = case.arrays()
    options = case.options()
    clean = (np.asarray(x, np.float64) for x in (q, k, v))
    exact = list(
        reference.attention(*clean, d_o=np.asarray(d_o, np.float64), **options)
    )

    B, S, T = case.shape[:3]
    seen = _seen(case, options)
    unseen = ~np.broadcast_to(seen.any(axis=1), (B, T))
    k[unseen] = GARBAGE
    v[unseen] = -GARBAGE

    def run(q, k, v, d_o, **options: Unpack[AttentionOptions]):
        o, lse = forward(q, k, v, **options)
        delta = compute_row_delta(o, d_o)
        d_q, d_k, d_v, *learned = backward(q, k, v, lse, delta, d_o, **options)
        if case.sinks:
            learned.insert(0, sink_gradient(options["sinks"], lse, delta))
        return o, lse, d_q, d_k, d_v, *learned

    results = compiled(run)(q, k, v, d_o, **options)
    wide = jnp.promote_types(case.dtype, jnp.float32)
    assert (results[0].dtype, results[1].dtype) == (jnp.dtype(case.dtype), wide)
    results = [np.asarray(x, np.float64) for x in results]

    keyless = ~np.broadcast_to(seen.any(axis=2), (B, S))
    for x in (
        results[0][keyless],
        results[2][keyless],
        results[3][unseen],
        results[4][unseen],
    ):
        assert not x.any()
    finite = np.isfinite(exact[1])
    np.testing.assert_array_equal(results[1][~finite], -np.inf)
    results[1], exact[1] = results[1][finite], exact[1][finite]
    plain = plain_attention(case) if case.dtype == "bfloat16" else None
    learned = [x for x in ("sinks", "biases") if x in options]
    for i, (a, b) in enumerate(zip(results, exact, strict=True)):
        name = ("o", "lse", "d_q", "d_k", "d_v", *learned)[i]
        if name == "lse" or plain is None:
            bound = tolerance * max(1.0, np.abs(b).max(initial=0))
            bound += 0.0 if plain is None else lse_rounding
            np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=name)
        else:
            error, plain_error = rms(a - b), rms(plain[i] - b)
            size = (
                np.sqrt(B * S) if name in learned else max(1.0, rms(b))
            )  # a sum of B·S terms
            assert error <= 1.5 * plain_error + rounding * size, (
                name,
                error,
                plain_error,
            )


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Of (*arrays, **options): arrays among the options traced, others static."""

    def run(*operands: Any, **options: Any) -> Any:
        traced = {name: x for name, x in options.items() if not np.isscalar(x)}
        static = {name: x for name, x in options.items() if np.isscalar(x)}
        quick = QUICK if jax.default_backend() == "cpu" else None
        return jax.jit(partial(function, **static), compiler_options=quick)(
            *operands, **traced
        )

    return run


def plain_attention(case: Case) -> list[np.ndarray]:
    """o, lse, dQ, dK, dV and, where there are any, sinks' and biases', by attention as
    one would write it in JAX, every score at once: what bf16 costs."""
    (q, k, v), d_o = case.arrays()
    options = case.options()
    allowed = _seen(case, options)[:, None]
    behind, _ = reference.distances(*case.shape[1:3], **_only(options, *_PLACED))
    group = q.shape[2] // k.shape[2]

    def run(q, k, v, sinks, biases):
        k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
        scores = jnp.einsum("bsnh,btnh->bnst", q, k, preferred_element_type=jnp.float32)
        scores *= options["scale"]
        if case.soft_cap is not None:
            scores = case.soft_cap * jnp.tanh(scores / case.soft_cap)
        if case.slopes:
            scores -= options["slopes"][:, None, None] * np.abs(behind)[:, None]
        if biases is not None:
            at = case.reach - np.clip(behind, -case.reach, case.reach)
            scores += biases[:, at].swapaxes(0, 1)
        scores = jnp.where(allowed, scores, -1e30)
        if sinks is not None:
            column = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:3], 1))
            scores = jnp.concatenate([scores, column], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]] * allowed
        o = jnp.einsum("bnst,btnh->bsnh", weights.astype(v.dtype), v)
        return o, jax.nn.logsumexp(scores, axis=-1).transpose(0, 2, 1)

    def both(q, k, v, sinks, biases, d_o):
        o, pull, lse = jax.vjp(run, q, k, v, sinks, biases, has_aux=True)
        return o, lse, *(x for x in pull(d_o) if x is not None)

    results = compiled(both)(q, k, v, options.get("sinks"), options.get("biases"), d_o)
    return [np.asarray(x, np.float64) for x in results]


_PLACED = ("q_offset", "k_offset", "q_positions", "k_positions")
_MASKS = ("causal", "window", "prefix", "segment_ids", *_PLACED)


def _only(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: x for name, x in options.items() if name in names}


def _seen(case: Case, options: dict[str, Any]) -> np.ndarray:
    """bool [B or 1, S, T]"""
    return reference.mask(*case.shape[1:3], **_only(options, *_MASKS))
