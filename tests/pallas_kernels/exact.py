"""Attention with every feature of the GPU kernels in float64 NumPy: every score, every weight."""

import numpy as np


def visible(S, T, how, where):
    """bool [B or 1, S, T]: which keys each query sees."""
    q_at, k_at = positions(S, T, where)
    seen = np.ones((1, S, T), bool)
    if how.causal:
        behind = q_at[:, :, None] - k_at[:, None]
        seen = behind >= 0
        if how.window is not None:
            seen = seen & (behind < how.window)
        if how.prefix:
            seen = seen | (k_at[:, None] < np.asarray(where.prefix)[:, None, None])
    if where.q_segments is not None:
        own, other = np.asarray(where.q_segments), np.asarray(where.k_segments)
        seen = seen & (own[:, :, None] == other[:, None]) & (own[:, :, None] > 0)
    return seen


def positions(S, T, where):
    given = (where.q_positions, where.q_offset, S), (where.k_positions, where.k_offset, T)
    return tuple(
        np.arange(n)[None] + (offset or 0) if at is None else np.asarray(at)
        for at, offset, n in given
    )


def attention(q, k, v, d_o, how, where):
    """(o, lse, dQ, dK, dV), the gradients of Σ d_o · o by the softmax's Jacobian."""
    q, k, v, d_o = (np.asarray(x, np.float64) for x in (q, k, v, d_o))
    (S, N, _), (T, K) = q.shape[1:], k.shape[1:3]
    seen = visible(S, T, how, where)
    q_at, k_at = positions(S, T, where)
    o, lse = np.zeros(d_o.shape), np.zeros(q.shape[:3])
    d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, k, v))
    for n in range(N):
        kv = n // (N // K)
        scores = np.einsum("bsh,bth->bst", q[:, :, n], k[:, :, kv]) * how.scale
        slope = np.ones(())
        if how.soft_cap is not None:
            tanh = np.tanh(scores / how.soft_cap)
            scores, slope = how.soft_cap * tanh, 1 - tanh**2
        if where.slopes is not None:
            scores = scores - where.slopes[n] * np.abs(q_at[:, :, None] - k_at[:, None])
        scores = np.where(seen, scores, -np.inf)
        sink = -np.inf if where.sinks is None else where.sinks[n]
        top = np.maximum(scores.max(axis=-1), sink)
        top = np.where(np.isfinite(top), top, 0)
        exp = np.exp(scores - top[..., None])
        total = exp.sum(axis=-1) + np.exp(sink - top)
        with np.errstate(divide="ignore"):
            lse[:, :, n] = top + np.log(total)
        weights = exp / np.where(total > 0, total, 1)[..., None]
        o[:, :, n] = np.einsum("bst,bth->bsh", weights, v[:, :, kv])
        d_weights = np.einsum("bsh,bth->bst", d_o[:, :, n], v[:, :, kv])
        inner = np.sum(weights * d_weights, axis=-1, keepdims=True)
        d_scores = weights * (d_weights - inner) * slope * how.scale
        d_q[:, :, n] = np.einsum("bst,bth->bsh", d_scores, k[:, :, kv])
        d_k[:, :, kv] += np.einsum("bst,bsh->bth", d_scores, q[:, :, n])
        d_v[:, :, kv] += np.einsum("bst,bsh->bth", weights, d_o[:, :, n])
    return o, lse, d_q, d_k, d_v


def operands(B, S, T, N, K, H, Hv, seed=0):
    """Random q, k, v and d_o in fp32."""
    rng = np.random.default_rng(seed)
    shapes = (B, S, N, H), (B, T, K, H), (B, T, K, Hv), (B, S, N, Hv)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
