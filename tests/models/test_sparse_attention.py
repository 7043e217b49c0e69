"""Sparse attention attends to what its indexer scores highest, and the indexer learns
from its own loss alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.build_context import BuildContext
from maxlm.models.layers.attend import AttentionInputs
from maxlm.models.layers.norm import NormConfig
from maxlm.models.layers.rope import compute_rotary
from maxlm.models.layers.sparse import (
    SparseAttention,
    SparseAttentionConfig,
    choose_best,
)
from maxlm.models.params import bind, flatten_names, param_specs
from maxlm.sharding import ShardingConfig

D = 10
SEGMENTS = np.array([[1] * 11, [1] * 4 + [2] * 5 + [0] * 2], np.int32)
POSITIONS = np.array([[*range(11)], [*range(4), *range(5), 0, 0]], np.int32)
CONFIG = SparseAttentionConfig.model_validate(
    {
        "attention": {
            "num_heads": 3,
            "num_kv_heads": 3,
            "head_dim": 7,
            "latent": {"q_rank": 5, "kv_rank": 6, "rotary_dim": 4, "value_dim": 5},
        },
        "index_heads": 4,
        "index_dim": 6,
        "top_k": 3,
        "loss_weight": 0.5,
    }
)


def test_the_best_are_chosen_and_of_equal_ones_the_earliest():
    rng = np.random.default_rng(0)
    scores = rng.integers(-2, 3, (4, 9, 9)).astype(np.float32)  # many are equal
    is_seen = rng.random((4, 9, 9)) < 0.7
    for top_k in (1, 4, 9):
        chosen = np.asarray(
            choose_best(jnp.asarray(scores), jnp.asarray(is_seen), top_k)
        )
        for index in np.ndindex(4, 9):
            order = np.argsort(-scores[index], kind="stable")
            best = [place for place in order if is_seen[index][place]][:top_k]
            assert set(np.flatnonzero(chosen[index])) == set(best)


@pytest.fixture(scope="module")
def layer(one_device_mesh):
    rules = ShardingConfig().compute.for_mesh(dict(one_device_mesh.shape))
    context = BuildContext(rules, jnp.float32, D, num_layers=2, init_std=0.02)
    return SparseAttention(CONFIG, NormConfig(), context)


def draw(layer):
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda spec: rng.normal(0, 0.6, spec.shape).astype(np.float32),
        param_specs(layer),
    )
    return params, rng.standard_normal((*SEGMENTS.shape, D)).astype(np.float32)


def run(layer, params, x):
    positions = jnp.asarray(POSITIONS)
    inputs = AttentionInputs(
        positions=positions,
        segment_ids=jnp.asarray(SEGMENTS),
        rotary=compute_rotary(positions, 4, 30.0),
        slopes=None,
        biases=None,
        scale=0.4,
        window=None,
        causal=True,
    )
    output = bind(layer, params)(x, inputs)
    return output.y, output.aux


def reference(params, x):
    """Outputs [B, S, D] and the indexer's loss in float64, a token at a time (arXiv
    2512.02556, eq. 1 to 4)."""
    p = {
        name: np.asarray(value, np.float64)
        for name, value in flatten_names(params).items()
    }

    def rms(row, name):
        size = np.sqrt(np.mean(row**2) + 1e-5)
        return row / size * p[f"{name}.scale"]

    def turn(row, position):
        rotated = row.copy()
        for i in range(2):
            angle = position * 30.0 ** (-i / 2)
            c = np.cos(angle)
            s = np.sin(angle)
            rotated[i] = c * row[i] - s * row[i + 2]
            rotated[i + 2] = s * row[i] + c * row[i + 2]
        return rotated

    y = np.zeros(x.shape)
    loss = 0.0
    for b in range(len(x)):
        vectors = []
        keys = []
        index_keys = []
        for s, row in enumerate(x[b].astype(np.float64)):
            at = POSITIONS[b, s]
            vector = rms(row @ p["key_down.kernel"], "key_norm")
            shared = turn(row @ p["key_rotary.kernel"], at)
            plain = np.einsum("c,cnh->nh", vector, p["key_up.kernel"])
            keys.append([np.append(head, shared) for head in plain])
            vectors.append(np.einsum("c,cnh->nh", vector, p["value_up.kernel"]))
            key = row @ p["index_key.kernel"]
            key = (key - key.mean()) / np.sqrt(key.var() + 1e-6)
            key = key * p["index_key_norm.scale"] + p["index_key_norm.bias"]
            index_keys.append(np.append(turn(key[:4], at), key[4:]))
            if SEGMENTS[b, s] == 0:
                continue

            narrow = rms(row @ p["query_down.kernel"], "query_norm")
            index_weight = row @ p["index_weight.kernel"] / np.sqrt(4 * 6)
            index_query = (narrow @ p["index_query.kernel"]).reshape(4, 6)
            seen = [t for t in range(s + 1) if SEGMENTS[b, t] == SEGMENTS[b, s]]
            scores = {
                t: sum(
                    weight
                    * max(np.append(turn(head[:4], at), head[4:]) @ index_keys[t], 0)
                    for weight, head in zip(index_weight, index_query, strict=True)
                )
                for t in seen
            }
            chosen = sorted(seen, key=lambda t: (-scores[t], t))[: CONFIG.top_k]
            query = np.einsum("r,rnh->nh", narrow, p["query.kernel"])
            mean_weights = np.zeros(len(chosen))
            for n in range(3):
                q = np.append(query[n, :3], turn(query[n, 3:], at))
                weights = np.exp([0.4 * q @ keys[t][n] for t in chosen])
                weights /= weights.sum()
                mean_weights += weights / 3
                head = sum(
                    w * vectors[t][n] for w, t in zip(weights, chosen, strict=True)
                )
                y[b, s] += head @ p["out.kernel"][n]
            index = np.exp([scores[t] for t in chosen])
            index /= index.sum()
            loss += np.sum(mean_weights * np.log(mean_weights / index))
    return y, loss


def test_outputs_and_the_indexer_s_loss_equal_the_reference(layer, one_device_mesh):
    """Of documents that share rows, and padding."""
    params, x = draw(layer)
    with jax.set_mesh(one_device_mesh):
        y, aux = run(layer, params, jnp.asarray(x))
    expected, loss = reference(params, x)
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()
    assert aux.sums["index_kl"] == pytest.approx(loss, rel=1e-5)
    assert aux.loss == pytest.approx(0.5 * loss, rel=1e-5)


@pytest.mark.more
@pytest.mark.heavy
def test_the_indexer_learns_from_its_own_loss_alone(layer, one_device_mesh):
    """No gradient of outputs reaches it, and none of its loss the rest of the model;
    its own is the slope of its loss."""
    params, x = draw(layer)

    def sum_outputs(params, x):
        return jnp.sum(run(layer, params, x)[0] ** 2)

    def index_kl(params, x):
        return run(layer, params, x)[1].sums["index_kl"]

    with jax.set_mesh(one_device_mesh):
        arguments = jax.tree.map(jnp.asarray, (params, x))
        of_outputs, _ = jax.grad(sum_outputs, argnums=(0, 1))(*arguments)
        of_loss, d_x = jax.grad(index_kl, argnums=(0, 1))(*arguments)
    assert not np.any(d_x)
    of_outputs = flatten_names(of_outputs)
    rng = np.random.default_rng(2)
    for name, gradient in flatten_names(of_loss).items():
        is_indexer = name.startswith("index_")
        assert bool(np.any(gradient)) == is_indexer, name
        assert bool(np.any(of_outputs[name])) != is_indexer, name
        if not is_indexer:
            continue
        value = flatten_names(params)[name]
        direction = rng.standard_normal(value.shape)
        direction *= 1e-6 / np.linalg.norm(direction)

        def move(sign, name=name, direction=direction):
            names = flatten_names(params)
            moved = {**names, name: names[name] + sign * direction}
            tree = jax.tree.structure(params)
            return reference(jax.tree.unflatten(tree, [*moved.values()]), x)[1]

        slope = (move(1) - move(-1)) / 2
        computed_slope = np.vdot(gradient, direction)
        size = np.linalg.norm(gradient) * 1e-6
        assert abs(slope - computed_slope) <= 1e-4 * size, name


def test_what_it_does_not_take_is_refused():
    values = CONFIG.model_dump()
    for name, value in (("sinks", True), ("chunk", 4), ("latent", None)):
        attention = {**values["attention"], name: value}
        with pytest.raises(MaxlmError, match=name):
            SparseAttentionConfig.model_validate({**values, "attention": attention})
