"""A decoder in float64 NumPy, written from the papers with loops: what the models must compute.

Nothing here comes from maxlm but the names of the parameters. One sequence, one head and one
query at a time.
"""

from math import erf, pi, sqrt

import numpy as np


def norm(x, params, kind, eps):
    """x [D]. RMSNorm: Zhang & Sennrich 2019, eq. 4. LayerNorm: Ba et al. 2016, eq. 4."""
    if kind == "layernorm":
        x = x - x.mean()
    y = x / sqrt((x * x).mean() + eps) * params["scale"]
    return y + params["bias"] if "bias" in params else y


def activation(kind, x):
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "relu":
        return np.where(x > 0, x, 0)
    if kind == "gelu":  # Hendrycks & Gimpel 2016
        return x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2)))
    assert kind == "gelu_tanh"
    return 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def mlp(x, params, config):
    """x [D] → [D]; Shazeer 2020, eq. 5 and 6."""
    up = linear(x, params["up"])
    if config["gated"]:
        hidden = activation(config["activation"], linear(x, params["gate"])) * up
    else:
        hidden = activation(config["activation"], up)
    return linear(hidden, params["down"])


def linear(x, params):
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


def rotate(x, position, theta):
    """x [H]; Su et al. 2021, eq. 13: pair i turns by position · theta^(-2i/H)."""
    half, y = len(x) // 2, np.empty_like(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        c, s = np.cos(angle), np.sin(angle)
        y[i], y[i + half] = c * x[i] - s * x[i + half], s * x[i] + c * x[i + half]
    return y


def head_attention(q, k, v, allowed):
    """q [H], k and v [T, H], allowed [T] → [H]; Vaswani et al. 2017, eq. 1."""
    if not allowed.any():
        return np.zeros_like(v[0])
    scores = np.array([q @ key for key in k[allowed]]) / sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum()) @ v[allowed]


def self_attention(x, params, positions, segments, config, theta):
    """x [S, D] → [S, D]; query head n reads kv head n // (N / K) (Ainslie et al. 2023)."""
    S, N, K = len(x), config["num_heads"], config["num_kv_heads"]

    def project(name, head):
        p = params[name]
        rows = x @ p["kernel"][:, head] + (p["bias"][head] if "bias" in p else 0)
        if theta is None or name == "value":
            return rows
        return np.array([rotate(r, at, theta) for r, at in zip(rows, positions, strict=True)])

    y = np.zeros_like(x)
    for n in range(N):
        group = n // (N // K)
        q, k, v = project("query", n), project("key", group), project("value", group)
        for s in range(S):
            before = (np.arange(S) <= s) & (np.arange(S) > s - (config["window"] or S))
            allowed = before & (segments == segments[s]) & (segments[s] != 0)
            y[s] += head_attention(q[s], k, v, allowed) @ params["out"]["kernel"][n]
    return y + params["out"].get("bias", 0)


def layer_of(stacked, index):
    return {
        name: layer_of(value, index) if isinstance(value, dict) else value[index]
        for name, value in stacked.items()
    }


def decoder(config, params, tokens, positions, segments):
    """Hidden states [S, D] and logits [S, V] of one row; config is a plain nested dict."""
    eps, kind = config["norm"]["eps"], config["norm"]["kind"]
    x = np.array([params["embedding"]["table"][t] for t in tokens])
    theta = None
    if config["positions"]["kind"] == "learned":
        x = x + np.array([params["positions"]["table"][p] for p in positions])
    elif config["positions"]["kind"] == "rope":
        theta = config["positions"]["theta"]

    def normed(x, p):
        return np.array([norm(row, p, kind, eps) for row in x])

    for i in range(config["num_layers"]):
        p = layer_of(params["layers"], i)
        y = normed(x, p["attention_norm"])
        x = x + self_attention(y, p["attention"], positions, segments, config["attention"], theta)
        y = normed(x, p["mlp_norm"])
        x = x + np.array([mlp(row, p["mlp"], config["mlp"]) for row in y])
    hidden = normed(x, params["final_norm"])
    tied = config["tie_embeddings"]
    head = params["embedding"]["table"].T if tied else params["head"]["kernel"]
    return hidden, hidden @ head


def cross_entropy(logits, targets, weights):
    """Sum over positions of weight · −log softmax(logits)[target]."""
    total = 0.0
    for row, target, weight in zip(logits, targets, weights, strict=True):
        top = row.max()
        total += weight * (top + np.log(np.exp(row - top).sum()) - row[target])
    return total
