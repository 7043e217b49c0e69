"""Attention in float64 NumPy, written from the definition: every score, every weight."""

import numpy as np


def mask(S, T, causal, window, q_positions, k_positions, segment_ids):
    """bool [B or 1, S, T]: which keys each query may read."""
    at = np.arange(S)[None] if q_positions is None else q_positions
    keys = np.arange(T)[None] if k_positions is None else k_positions
    behind = at[:, :, None] - keys[:, None]
    allowed = behind >= 0 if causal else np.ones((1, S, T), bool)
    if window is not None:
        allowed = allowed & (behind < window)
    if segment_ids is not None:
        own, other = segment_ids
        allowed = allowed & (own[:, :, None] == other[:, None]) & (own[:, :, None] > 0)
    return allowed


def _weights(q, k, allowed, scale):
    """Of one head: softmax weights [B, S, T] and log-sum-exps [B, S], 0 and −inf without keys."""
    scores = np.where(allowed, np.einsum("bsh,bth->bst", q, k) * scale, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0)
    exp = np.exp(scores - top)
    total = exp.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return exp / np.where(total > 0, total, 1), lse


def attention(
    q,
    k,
    v,
    *,
    d_o=None,
    causal=True,
    window=None,
    q_positions=None,
    k_positions=None,
    segment_ids=None,
    scale=None,
):
    """Vaswani et al. 2017, eq. 1: the output and log-sum-exps; with ``d_o``, also the gradients of
    Σ d_o · output, by the softmax's Jacobian P · (dP − Σ P · dP)."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (S, N, H), (T, K) = q.shape[1:], k.shape[1:3]
    allowed = mask(S, T, causal, window, q_positions, k_positions, segment_ids)
    scale = H**-0.5 if scale is None else scale
    o, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, k, v))
    for n in range(N):
        kv = n // (N // K)
        weights, lse[:, :, n] = _weights(q[:, :, n], k[:, :, kv], allowed, scale)
        o[:, :, n] = np.einsum("bst,bth->bsh", weights, v[:, :, kv])
        if d_o is not None:
            d_weights = np.einsum("bsh,bth->bst", d_o[:, :, n], v[:, :, kv])
            inner = np.sum(weights * d_weights, axis=-1, keepdims=True)
            d_scores = weights * (d_weights - inner) * scale
            d_q[:, :, n] = np.einsum("bst,bth->bsh", d_scores, k[:, :, kv])
            d_k[:, :, kv] += np.einsum("bst,bsh->bth", d_scores, q[:, :, n])
            d_v[:, :, kv] += np.einsum("bst,bsh->bth", weights, d_o[:, :, n])
    return (o, lse) if d_o is None else (o, lse, d_q, d_k, d_v)


def packed(rng, B, S):
    """int32 [B, S]: up to three documents, then padding."""
    cuts = np.sort(rng.integers(0, S + 1, (B, 3)), axis=1)
    segments = 1 + (np.arange(S) >= cuts[:, :1]) + (np.arange(S) >= cuts[:, 1:2])
    return np.where(np.arange(S) < cuts[:, 2:], segments, 0).astype(np.int32)


def operands(B, S, T, N, K, H, seed=0):
    """Random q, k, v in fp32."""
    rng = np.random.default_rng(seed)
    shapes = ((B, S, N, H), (B, T, K, H), (B, T, K, H))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
