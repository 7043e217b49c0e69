"""A mixture-of-experts layer in float64 NumPy, one token and one expert at a time.

Nothing here comes from maxlm but the names of parameters and settings.
"""

from math import ceil

import numpy as np

from tests.models.reference import hidden_unit, linear, mlp


def route(logits, bias, config, experts=None):
    """logits [E] of one token → (scores [E], chosen experts best first, their weights).
    ``experts``: in place of those chosen, unless the first is -1."""
    if config["score"] == "softmax":
        scores = np.exp(logits - logits.max())
        scores = scores / scores.sum()
    elif config["score"] == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.sqrt(np.log1p(np.exp(logits)))
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
    if experts is not None and experts[0] >= 0:
        chosen = list(experts)
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
    served_pairs = set()
    for t, j in pairs:
        if taken[chosen[t][j]] < room:
            taken[chosen[t][j]] += 1
            served_pairs.add((t, j))
    return served_pairs


def expert(x, params, e, config):
    def map_by(name, x):
        y = x @ params[name][e]
        return y + params[f"{name}_bias"][e] if config["bias"] else y

    gate = map_by("gate", x) if config["gated"] else None
    return map_by("down", hidden_unit(config["activation"], map_by("up", x), gate))


def shared(x, params, config):
    y = mlp(x, params["shared"], config)
    if config["shared_gate"]:
        y = y / (1 + np.exp(-(x @ params["shared_gate"])))
    return y


def moe(params, x, counted, config, replayed=None):
    """x [B, S, D], counted [B, S] → (y, loss, load [E], dropped); ``config`` a plain
    dict; ``replayed`` int [B, S, k]: see :func:`route`."""
    num_experts, k = config["num_experts"], config["experts_per_token"]
    bias = params.get("selection_bias", np.zeros(num_experts))
    y = np.zeros_like(x)
    router_bias = params.get("router_bias", np.zeros(num_experts))
    load = np.zeros(num_experts)
    mass = np.zeros(num_experts)
    squares, dropped = 0.0, 0
    for b, row in enumerate(x):
        logits = row @ params["router"] + router_bias
        row_routes = [None] * len(row) if replayed is None else replayed[b]
        routes = [
            route(token_logits, bias, config, token_experts)
            for token_logits, token_experts in zip(logits, row_routes, strict=True)
        ]
        served_pairs = served([chosen for _, chosen, _ in routes], counted[b], config)
        for t, token in enumerate(row):
            scores, chosen, weights = routes[t]
            if "shared" in params:
                y[b, t] += shared(token, params, config)
            if not counted[b, t]:
                continue
            mass += scores / scores.sum()
            squares += np.log(np.exp(logits[t]).sum()) ** 2
            narrow = token
            if config["latent_dim"]:
                narrow = linear(token, params["latent_down"])
            routed = np.zeros_like(narrow)
            for j, (e, weight) in enumerate(zip(chosen, weights, strict=True)):
                load[e] += 1
                dropped += (t, j) not in served_pairs
                if (t, j) not in served_pairs:
                    continue
                if config["weigh_inputs"]:
                    routed += expert(weight * narrow, params, e, config)
                else:
                    routed += weight * expert(narrow, params, e, config)
            if config["latent_dim"]:
                routed = linear(routed, params["latent_up"])
            y[b, t] += routed
    tokens = counted.sum()
    balance = num_experts * ((load / (tokens * k)) * (mass / tokens)).sum()
    loss = tokens * config["balance_loss"] * balance + config["z_loss"] * squares
    return y, loss, load, dropped
