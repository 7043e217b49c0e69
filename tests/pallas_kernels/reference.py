"""Attention in float64 NumPy, written from the definition: every score, every
weight."""

import numpy as np


def distances(S, T, *, q_offset=0, k_offset=0, q_positions=None, k_positions=None):
    """int [B or 1, S, T]: a query's position less a key's; and the keys' positions [B
    or 1, T]."""
    at = (
        int(q_offset) + np.arange(S)[None]
        if q_positions is None
        else np.asarray(q_positions)
    )
    keys = (
        int(k_offset) + np.arange(T)[None]
        if k_positions is None
        else np.asarray(k_positions)
    )
    return at[:, :, None] - keys[:, None], keys


def mask(
    S,
    T,
    *,
    causal=True,
    window=None,
    prefix=None,
    segment_ids=None,
    q_offset=0,
    k_offset=0,
    q_positions=None,
    k_positions=None,
):
    """bool [B or 1, S, T]: which keys each query may read."""
    behind, keys = distances(
        S,
        T,
        q_offset=q_offset,
        k_offset=k_offset,
        q_positions=q_positions,
        k_positions=k_positions,
    )
    allowed = behind >= 0 if causal else np.ones((1, S, T), bool)
    if window is not None:
        allowed = allowed & (behind < window)
    if prefix is not None:
        allowed = allowed | (keys < np.asarray(prefix)[:, None])[:, None]
    if segment_ids is not None:
        q_segments, k_segments = (np.asarray(x) for x in segment_ids)
        allowed = (
            allowed
            & (q_segments[:, :, None] == k_segments[:, None])
            & (q_segments[:, :, None] != 0)
        )
    return allowed


def _weights(scores, sink):
    """Of one head: softmax weights [B, S, T] and log-sum-exps [B, S], 0 and −inf
    without keys."""
    top = np.maximum(scores.max(axis=-1, keepdims=True), sink)
    top = np.where(np.isfinite(top), top, 0)
    exp = np.exp(scores - top)
    total = exp.sum(axis=-1, keepdims=True) + np.exp(sink - top)
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
    prefix=None,
    segment_ids=None,
    scale=None,
    soft_cap=None,
    slopes=None,
    sinks=None,
    biases=None,
    q_offset=0,
    k_offset=0,
    q_positions=None,
    k_positions=None,
):
    """Vaswani et al. 2017, eq. 1: the output and log-sum-exps; with ``d_o``, also the
    gradients of Σ d_o · output by q, k, v and, where there are any, sinks and biases,
    by the softmax's Jacobian P · (dP − Σ P · dP), in which a sink has a weight and no
    value."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (S, N, H), (T, K) = q.shape[1:], k.shape[1:3]
    places = {
        "q_offset": q_offset,
        "k_offset": k_offset,
        "q_positions": q_positions,
        "k_positions": k_positions,
    }
    allowed = mask(
        S,
        T,
        causal=causal,
        window=window,
        prefix=prefix,
        segment_ids=segment_ids,
        **places,
    )
    behind, _ = distances(S, T, **places)
    scale = H**-0.5 if scale is None else scale
    o, lse = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])
    d_q, d_k, d_v = (np.zeros(x.shape) for x in (q, k, v))
    d_sinks = np.zeros(N)
    d_biases = None if biases is None else np.zeros(np.shape(biases))
    learned = [
        x for x, arrays in ((d_sinks, sinks), (d_biases, biases)) if arrays is not None
    ]
    for n in range(N):
        kv = n // (N // K)
        sink = -np.inf if sinks is None else np.float64(sinks[n])
        scores = np.einsum("bsh,bth->bst", q[:, :, n], k[:, :, kv]) * scale
        derivatives = 1
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
            derivatives = 1 - (scores / soft_cap) ** 2
        if slopes is not None:
            scores = scores - np.float64(slopes[n]) * np.abs(behind)
        if biases is not None:
            reach = len(biases[n]) // 2
            at = reach - np.clip(behind, -reach, reach)
            scores = scores + np.asarray(biases[n], np.float64)[at]
        weights, lse[:, :, n] = _weights(np.where(allowed, scores, -np.inf), sink)
        o[:, :, n] = np.einsum("bst,bth->bsh", weights, v[:, :, kv])
        if d_o is not None:
            d_weights = np.einsum("bsh,bth->bst", d_o[:, :, n], v[:, :, kv])
            inner = np.sum(weights * d_weights, axis=-1, keepdims=True)
            d_scores = weights * (d_weights - inner)
            if biases is not None:
                np.add.at(d_biases[n], np.broadcast_to(at, d_scores.shape), d_scores)
            d_scores = d_scores * derivatives * scale
            d_q[:, :, n] = np.einsum("bst,bth->bsh", d_scores, k[:, :, kv])
            d_k[:, :, kv] += np.einsum("bst,bsh->bth", d_scores, q[:, :, n])
            d_v[:, :, kv] += np.einsum("bst,bsh->bth", weights, d_o[:, :, n])
            d_sinks[n] = -np.sum((1 - weights.sum(axis=-1)) * inner[..., 0])
    return (o, lse) if d_o is None else (o, lse, d_q, d_k, d_v, *learned)


def packed(rng, B, S):
    """int32 [B, S]: up to three documents, then padding."""
    cuts = np.sort(rng.integers(0, S + 1, (B, 3)), axis=1)
    segments = 1 + (np.arange(S) >= cuts[:, :1]) + (np.arange(S) >= cuts[:, 1:2])
    return np.where(np.arange(S) < cuts[:, 2:], segments, 0).astype(np.int32)


def operands(B, S, T, N, K, H, seed=0, Hv=None):
    """Random q, k, v in fp32."""
    rng = np.random.default_rng(seed)
    shapes = ((B, S, N, H), (B, T, K, H), (B, T, K, Hv or H))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
