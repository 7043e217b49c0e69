"""A mixture-of-experts layer in float64 NumPy, one token and one expert at a time.

Nothing here comes from maxlm but the names of parameters and settings.
"""

from math import ceil

import numpy as np

from tests.models.reference import activation, mlp


def route(logits, bias, config):
    """logits [E] of one token → (scores [E], chosen experts best first, their
    weights)."""
    if config["score"] == "softmax":
        scores = np.exp(logits - logits.max())
        scores = scores / scores.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    ranked = scores + bias
    candidates = list(range(len(logits)))
    if config["groups"] > 1:
        groups = np.split(np.array(candidates), config["groups"])
        best = 1 if config["group_score"] == "max" else 2
        rank = [sorted(ranked[group])[-best:] for group in groups]
        order = sorted(range(len(groups)), key=lambda g: (-sum(rank[g]), g))
        candidates = sorted(
            e for g in order[: config["groups_per_token"]] for e in groups[g]
        )
    chosen = sorted(candidates, key=lambda e: (-ranked[e], e))[
        : config["experts_per_token"]
    ]
    weights = scores[chosen]
    if config["renormalise"]:
        weights = weights / weights.sum()
    return scores, chosen, weights * config["scale"]


def served(chosen, counted, config):
    """chosen [S][k] of one sequence → the (token, rank) pairs that an expert has room
    for."""
    length = len(chosen)
    k = config["experts_per_token"]
    pairs = [(t, j) for j in range(k) for t in range(length) if counted[t]]
    if config["dispatch"] == "dropless":
        return set(pairs)
    room = ceil(length * k / config["num_experts"] * config["capacity_factor"])
    taken = dict.fromkeys(range(config["num_experts"]), 0)
    kept = set()
    for t, j in pairs:
        if taken[chosen[t][j]] < room:
            taken[chosen[t][j]] += 1
            kept.add((t, j))
    return kept


def expert(x, params, e, config):
    up = x @ params["up"][e]
    if config["gated"]:
        hidden = activation(config["activation"], x @ params["gate"][e]) * up
    else:
        hidden = activation(config["activation"], up)
    return hidden @ params["down"][e]


def moe(params, x, counted, config):
    """x [B, S, D], counted [B, S] → (y, loss, load [E], dropped); ``config`` a plain
    dict."""
    num_experts, k = config["num_experts"], config["experts_per_token"]
    bias = params.get("selection_bias", np.zeros(num_experts))
    y = np.zeros_like(x)
    load = np.zeros(num_experts)
    mass = np.zeros(num_experts)
    squares, dropped = 0.0, 0
    for b, row in enumerate(x):
        routes = [route(token @ params["router"], bias, config) for token in row]
        kept = served([chosen for _, chosen, _ in routes], counted[b], config)
        for t, token in enumerate(row):
            scores, chosen, weights = routes[t]
            if "shared" in params:
                y[b, t] += mlp(token, params["shared"], config)
            if not counted[b, t]:
                continue
            mass += scores / scores.sum()
            squares += np.log(np.exp(token @ params["router"]).sum()) ** 2
            for j, (e, weight) in enumerate(zip(chosen, weights, strict=True)):
                load[e] += 1
                dropped += (t, j) not in kept
                if (t, j) in kept:
                    y[b, t] += weight * expert(token, params, e, config)
    tokens = counted.sum()
    balance = num_experts * ((load / (tokens * k)) * (mass / tokens)).sum()
    loss = tokens * config["balance_loss"] * balance + config["z_loss"] * squares
    return y, loss, load, dropped
