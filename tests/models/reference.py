"""A decoder in float64 NumPy, written from the papers with loops: what the models must
compute.

Nothing here comes from maxlm but the names of the parameters. One sequence, one head
and one query at a time.
"""

from math import ceil, erf, log2, pi, sqrt

import numpy as np


def norm(x, params, config):
    """x [D]. RMSNorm: Zhang & Sennrich 2019, eq. 4. LayerNorm: Ba et al. 2016, eq.
    4."""
    if config["kind"] == "layernorm":
        x = x - x.mean()
    scale = params["scale"] + (1 if config["zero_centred"] else 0)
    y = x / sqrt((x * x).mean() + config["eps"]) * scale
    return y + params["bias"] if "bias" in params else y


def norms(x, params, config):
    """x [S, D]."""
    return np.array([norm(row, params, config) for row in x])


def activation(kind, x):
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "relu":
        return np.where(x > 0, x, 0)
    if kind == "relu2":
        return np.where(x > 0, x, 0) ** 2
    if kind == "gelu":  # Hendrycks & Gimpel 2016
        return x * 0.5 * (1 + np.vectorize(erf)(x / sqrt(2)))
    assert kind == "gelu_tanh"
    return 0.5 * x * (1 + np.tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))


def hidden_unit(kind, up, gate):
    """up and maybe gate [F] → [F]; Shazeer 2020, eq. 5 and 6, or gpt-oss's unit."""
    if isinstance(kind, str):
        return activation(kind, up) if gate is None else activation(kind, gate) * up
    gate = np.where(gate > kind["limit"], kind["limit"], gate)
    up = np.clip(up, -kind["limit"], kind["limit"])
    swish = gate / (1 + np.exp(-kind["alpha"] * gate))
    return (up + kind["up_offset"]) * swish


def mlp(x, params, config):
    """x [D] → [D]."""
    gate = linear(x, params["gate"]) if config["gated"] else None
    hidden = hidden_unit(config["activation"], linear(x, params["up"]), gate)
    return linear(hidden, params["down"])


def linear(x, params):
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


def rotate(x, position, theta, size=None):
    """x [H]; Su et al. 2021, eq. 13: pair i of the first R turns by position ·
    theta^(-2i/R)."""
    size = size or len(x)
    half = size // 2
    y = x.copy()
    for i in range(half):
        angle = position * theta ** (-2 * i / size)
        c = np.cos(angle)
        s = np.sin(angle)
        y[i], y[i + half] = c * x[i] - s * x[i + half], s * x[i] + c * x[i + half]
    return y


def wave(position, place, width):
    """Vaswani et al. 2017, §3.5: sines at even places, cosines at odd ones."""
    angle = position / 10000 ** (place // 2 * 2 / width)
    return np.cos(angle) if place % 2 else np.sin(angle)


def alibi_slope(head, heads):
    """Press et al. 2022, §3: a geometric sequence that starts at and has the ratio
    2^(-8/n); its published code takes those that n heads lack from the sequence of the
    next power of two."""
    above = 2 ** ceil(log2(heads))
    below = above if above == heads else above // 2
    if head < below:
        return 2.0 ** (-8 * (head + 1) / below)
    return 2.0 ** (-8 * (2 * (head - below) + 1) / above)


def relative_bucket(distance, buckets, reach, causal):
    """Of a key so far behind the query (Raffel et al. 2020, §2.1, and its published
    code): half of the buckets for one distance each, the other half's lower ends a
    geometric sequence up to ``reach``; in integers, with roots and logarithms taken
    away."""
    if not causal:
        half = buckets // 2
        if distance < 0:
            return half + relative_bucket(-distance, half, reach, True)
        buckets = half
    exact = buckets // 2
    far = buckets - exact
    distance = max(distance, 0)
    if distance < exact:
        return distance
    # The last k for which distance ≥ exact · (reach / exact)^(k / far).
    reached = [k for k in range(far) if distance**far >= reach**k * exact ** (far - k)]
    return exact + reached[-1]


def score_bias(config, table, head, distance):
    """What a score gains for a key so far behind the query."""
    if config["kind"] == "alibi":
        return -alibi_slope(head, config["heads"]) * distance
    if config["kind"] == "relative":
        bucket = relative_bucket(
            distance, config["buckets"], config["max_distance"], True
        )
        return table[bucket, head]
    return 0.0


def capped(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def head_attention(q, k, v, allowed, bias, sink, config):
    """q [H], k and v [T, H], allowed and bias [T] → [H]; Vaswani et al. 2017, eq. 1;
    the sink is the score of a key without a value."""
    if not allowed.any():
        return np.zeros_like(v[0])
    scale = config["scale"] or 1 / sqrt(len(q))
    scores = np.array(
        [capped(scale * (q @ key), config["soft_cap"]) for key in k[allowed]]
    )
    scores += bias[allowed]
    scores = np.append(scores, sink)
    weights = np.exp(scores - scores.max())
    return (weights / weights.sum())[:-1] @ v[allowed]


def self_attention(x, params, seen, config, window, table):
    """x [S, D] → [S, D]; query head n reads kv head n // (N / K) (Ainslie et al. 2023).

    Args:
        seen: positions and segments [S], and the settings of positions and norms.
        window: how many tokens a token sees; None: all before it.
        table: learnt biases by distance [buckets, N], if there are any.
    """
    positions, segments, scheme, norm_config = seen
    S = len(x)
    N = config["num_heads"]
    K = config["num_kv_heads"]
    scheme = scheme | {"heads": N}

    def normalise(rows, name):
        """rows [S, heads, H], as the form of the norms says."""
        size = rows.shape[-1]
        if name == "value":
            if not config["value_norm"]:
                return rows
            p = {"scale": np.full(size, 0.0 if norm_config["zero_centred"] else 1.0)}
            return np.array([norms(token, p, norm_config) for token in rows])
        if not config["qk_norm"]:
            return rows
        p = params[f"{name}_norm"]
        if config["qk_norm_form"] == "all_heads":
            flat = {key: value.reshape(-1) for key, value in p.items()}
            joined = norms(rows.reshape(S, -1), flat, norm_config)
            return joined.reshape(rows.shape)
        assert config["qk_norm_form"] == "head"
        return np.array([norms(token, p, norm_config) for token in rows])

    def turn(rows):
        if scheme["kind"] != "rope":
            return rows
        settings = scheme["theta"], scheme["rotary_dim"]
        return np.array(
            [
                [rotate(head, at, *settings) for head in token]
                for token, at in zip(rows, positions, strict=True)
            ]
        )

    def project(name):
        """[S, heads, H] of all heads."""
        p = params["key" if name == "value" and config["keys_as_values"] else name]
        rows = np.einsum("sd,dnh->snh", x, p["kernel"]) + p.get("bias", 0)
        if config["clip"]:
            rows = np.clip(rows, -config["clip"], config["clip"])
        if name == "value":
            return normalise(rows, name)
        if config["qk_norm_after_rope"]:
            return normalise(turn(rows), name)
        return turn(normalise(rows, name))

    queries, keys, values = project("query"), project("key"), project("value")
    heat = config["temperature"]
    if heat is not None:
        steps = np.floor((positions + heat["offset"]) / heat["length"])
        queries = queries * (1 + heat["scale"] * np.log(1 + steps))[:, None, None]
    chunk = config["chunk"] or np.inf
    y = np.zeros_like(x)
    for n in range(N):
        group = n // (N // K)
        q, k, v = queries[:, n], keys[:, group], values[:, group]
        for s in range(S):
            behind = s - np.arange(S)
            allowed = (behind >= 0) & (behind < (window or S))
            allowed &= (segments == segments[s]) & (segments[s] != 0)
            allowed &= positions // chunk == positions[s] // chunk
            bias = np.array([score_bias(scheme, table, n, int(d)) for d in behind])
            sink = params["sinks"][n] if config["sinks"] else -np.inf
            head = head_attention(q[s], k, v, allowed, bias, sink, config)
            if config["output_gate"]:
                gate = x[s] @ params["gate"]["kernel"][:, n]
                head = head / (1 + np.exp(-gate))
            y[s] += head @ params["out"]["kernel"][n]
    return y + params["out"].get("bias", 0)


def block(x, p, attend, feed, normed, placement):
    """One layer, with parameters p: Xiong et al. 2020 (pre, post), Gemma Team 2024
    (sandwich), Wang & Komatsuzaki 2021 (parallel)."""
    if placement == "post":
        x = normed(x + attend(x), p["attention_norm"])
        return normed(x + feed(x), p["mlp_norm"])
    y = normed(x, p["attention_norm"])
    if placement == "parallel_shared":
        return x + attend(y) + feed(y)
    if placement == "parallel":
        return x + attend(y) + feed(normed(x, p["mlp_norm"]))
    sandwich = placement == "sandwich"
    y = attend(y)
    x = x + (normed(y, p["attention_post_norm"]) if sandwich else y)
    y = feed(normed(x, p["mlp_norm"]))
    return x + (normed(y, p["mlp_post_norm"]) if sandwich else y)


def layer_of(stacked, index):
    return {
        name: layer_of(value, index) if isinstance(value, dict) else value[index]
        for name, value in stacked.items()
    }


def layers_of(params):
    """Every layer's parameters, first to last."""
    for name in ("first_layers", "layers", "last_layers"):
        if name in params:
            for i in range(len(params[name]["attention_norm"]["scale"])):
                yield layer_of(params[name], i)


def embedded(config, params, tokens, positions):
    """The first layer's input [S, D]."""
    x = (
        np.array([params["embedding"]["table"][t] for t in tokens])
        * config["embedding_scale"]
    )
    scheme, width = config["positions"], config["d_model"]
    if scheme["kind"] == "learned":
        x = x + np.array(
            [params["positions"]["table"][p + scheme["offset"]] for p in positions]
        )
    if scheme["kind"] == "sinusoidal":
        x = x + np.array([[wave(p, i, width) for i in range(width)] for p in positions])
    return (
        norms(x, params["embedding_norm"], config["norm"])
        if config["embedding_norm"]
        else x
    )


def decoder(config, params, tokens, positions, segments):
    """Hidden states [S, D] and logits [S, V] of one row; config is a plain nested
    dict."""
    x = embedded(config, params, tokens, positions)
    kinds = config["pattern"]

    def normed(x, p):
        return norms(x, p, config["norm"])

    for number, p in enumerate(layers_of(params)):
        window, scheme = config["attention"]["window"], config["positions"]
        if kinds:
            kind = kinds[number % len(kinds)]
            window = kind["window"]
            scheme = kind["positions"] or scheme
        seen = (positions, segments, scheme, config["norm"])
        of_layer = (
            p["attention"],
            seen,
            config["attention"],
            window,
            params.get("relative"),
        )
        x = block(
            x,
            p,
            lambda y, of_layer=of_layer: self_attention(y, *of_layer),
            lambda y, p=p: np.array([mlp(row, p["mlp"], config["mlp"]) for row in y]),
            normed,
            config["placement"],
        )
    hidden = normed(x, params["final_norm"]) if config["final_norm"] else x
    tied = config["tie_embeddings"]
    head = params["embedding"]["table"].T if tied else params["head"]["kernel"]
    logits = hidden @ head * config["logit_scale"] + params.get("head_bias", 0)
    return hidden, capped(logits, config["logit_cap"])


def cross_entropy(logits, targets, weights):
    """Sum over positions of weight · −log softmax(logits)[target]."""
    total = 0.0
    for row, target, weight in zip(logits, targets, weights, strict=True):
        top = row.max()
        total += weight * (top + np.log(np.exp(row - top).sum()) - row[target])
    return total
