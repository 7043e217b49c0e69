"""Layers with a gated delta rule compute what the papers say: a float64 NumPy
implementation, token by token, gives the same for packed rows; caches give the same as
whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.blocks import MIXERS
from maxlm.models.costs import get_costs
from maxlm.models.layers.gated_delta_net import GatedDeltaNetConfig
from maxlm.models.layers.kimi_delta_attention import KimiDeltaAttentionConfig
from maxlm.models.params import bind, flatten_names, init_params, param_specs
from tests.models import building, reference
from tests.models.building import POSITIONS, SEGMENTS
from tests.models.generation import check_generation_equals_forward_pass

WIDTH = 3
DELTA = {"kind": "gated_delta_net", "num_heads": 6, "num_key_heads": 3} | {
    "key_dim": 5,
    "value_dim": 4,
    "conv_width": WIDTH,
}
MIXERS_BY_NAME = {
    "delta": DELTA,
    "negative": DELTA | {"negative_eigenvalues": True, "norm_eps": 0.01},
    "kimi": {"kind": "kimi_delta_attention", "num_heads": 2, "head_dim": 5, "rank": 3}
    | {"conv_width": WIDTH},
    "bounded": {"kind": "kimi_delta_attention", "num_heads": 2, "head_dim": 5}
    | {"conv_width": WIDTH, "squeezed": False, "min_log_decay": -3.0},
}


def make_config(name: str, **changes) -> DecoderConfig:
    settings = {
        "vocab_size": 29,
        "num_layers": 2,
        "d_model": 7,
        "max_seq_len": 64,
        "mixer": MIXERS_BY_NAME[name],
        "ffn": "none",
        "norm": {"eps": 1e-4},
        "positions": {"kind": "none"},
    }
    return DecoderConfig.model_validate(settings | changes)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def convolve(x, weight, segments):
    """x [S, heads, size] → silu of the sums over each token's own document."""
    total = np.zeros_like(x)
    for s in range(len(x)):
        for lag in range(WIDTH):
            if lag <= s and len({*segments[s - lag : s + 1]}) == 1:
                total[s] += weight[..., -1 - lag] * x[s - lag]
    return total * sigmoid(total)


def normalise(x):
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)


def mixer(x, p, segments, config, model_eps):
    """x [S, D] → [S, D] (Yang et al. 2024, eq. 10; Kimi Team 2025, eq. 1), with
    parameters p."""

    def project(name):
        return np.tensordot(x, p[name]["kernel"], 1)

    q, k, v = (
        convolve(project(name), p[f"{name}_conv"], segments)
        for name in ("query", "key", "value")
    )
    q = normalise(q)
    k = normalise(k)
    rates = np.exp(p["A_log"])
    if config["kind"] == "gated_delta_net":
        steps = np.log1p(np.exp(project("decay") + p["dt_bias"]))
        decay = np.exp(-rates * steps)[..., None]
        gate = project("gate")
        gate = gate * sigmoid(gate)
    elif config["squeezed"]:
        logits = np.tensordot(project("decay_down"), p["decay_up"]["kernel"], 1)
        steps = np.log1p(np.exp(logits + p["dt_bias"]))
        decay = np.exp(-rates[:, None] * steps)
        gate = np.tensordot(project("gate_down"), p["gate_up"]["kernel"], 1)
        gate = sigmoid(gate)
    else:
        steps = rates[:, None] * (project("decay") + p["dt_bias"])
        decay = np.exp(config["min_log_decay"] * sigmoid(steps))
        gate = sigmoid(project("gate"))
    beta = sigmoid(project("beta"))
    if config.get("negative_eigenvalues"):
        beta = 2 * beta
    num_heads, value_dim = v.shape[1:]
    key_dim = k.shape[2]
    group_size = num_heads // k.shape[1]
    y = np.zeros_like(v)
    for head in range(num_heads):
        state = np.zeros((key_dim, value_dim))
        for s in range(len(x)):
            if s and segments[s] != segments[s - 1]:
                state[:] = 0
            key = k[s, head // group_size]
            state = decay[s, head, :, None] * state
            read = key @ state
            state = state + beta[s, head] * np.outer(key, v[s, head] - read)
            y[s, head] = q[s, head // group_size] @ state / np.sqrt(key_dim)
    eps = config["norm_eps"] or model_eps
    y = y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + eps)
    y = y * p["norm"]["scale"] * gate
    return np.tensordot(y, p["out"]["kernel"], 2)


def reference_hidden(config, params, tokens, segments):
    """Hidden states [S, D] of one row."""
    settings = config.model_dump()
    x = params["embedding"]["table"][tokens]
    for index in range(config.num_layers):
        p = reference.layer_of(params["layers"], index)
        y = reference.norms(x, p["attention_norm"], settings["norm"])
        mixer_settings = settings["mixer"]
        eps = settings["norm"]["eps"]
        x = x + mixer(y, p[mixer_settings["kind"]], segments, mixer_settings, eps)
    return reference.norms(x, params["final_norm"], settings["norm"])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        "kimi",
        pytest.param("delta", marks=pytest.mark.more),
        pytest.param("negative", marks=pytest.mark.more),
        pytest.param("bounded", marks=pytest.mark.more),
    ],
)
def test_hidden_states_and_gradients_equal_the_reference(name, one_device_mesh):
    """Rows of several documents. Gradients by central differences in float64 along a
    random direction for each parameter."""
    config = make_config(name)
    mesh = one_device_mesh
    params = building.random_params(config, mesh)
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, config.vocab_size, SEGMENTS.shape)
    cotangent = rng.standard_normal((*SEGMENTS.shape, config.d_model))
    cotangent *= (SEGMENTS > 0)[..., None]

    @jax.jit
    def run(params):
        def loss(params):
            hidden, _ = bind(model, params)(tokens, POSITIONS, SEGMENTS)
            return jnp.sum(hidden * cotangent), hidden

        return jax.grad(loss, has_aux=True)(params)

    with jax.set_mesh(mesh):
        model = building.decoder(config, mesh)
        placed = building.on_devices(params, building.storage(config, mesh))
        gradients, hidden = run(placed)

    def reference_rows(params):
        rows = zip(tokens, SEGMENTS, strict=True)
        return np.array([reference_hidden(config, params, *row) for row in rows])

    truth = reference_rows(params)
    assert np.abs(hidden - truth).max() <= 1e-5 * np.abs(truth).max()
    gradients = flatten_names(gradients)
    for parameter in gradients:
        if parameter.startswith("head"):
            continue
        direction = rng.standard_normal(gradients[parameter].shape)
        above, below = (
            np.sum(
                cotangent
                * reference_rows(
                    building.change(
                        params,
                        parameter,
                        lambda x, step=step, along=direction: x + step * along,
                    )
                )
            )
            for step in (1e-5, -1e-5)
        )
        slope = (above - below) / 2e-5
        scale = np.abs(gradients[parameter]).max() * np.sqrt(direction.size)
        result = np.sum(gradients[parameter] * direction)
        assert result == pytest.approx(slope, abs=1e-4 * scale), parameter


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("sizes", "pattern"),
    [
        ({}, ["delta", "kimi"]),
        pytest.param({"tensor": 2}, ["delta", "full", "kimi"], marks=pytest.mark.more),
    ],
)
def test_generation_equals_the_full_forward_pass(sizes, pattern, mesh):
    """Both kinds, and a hybrid of them and attention."""
    axes = mesh(**sizes)
    kinds = {
        "delta": {
            "mixer": MIXERS_BY_NAME["negative"] | {"num_heads": 4, "num_key_heads": 2}
        },
        "kimi": {"mixer": MIXERS_BY_NAME["kimi"]},
        "full": {},
    }
    attention = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4}
    config = make_config(
        "delta",
        vocab_size=30,
        num_layers=len(pattern),
        mixer=None,
        attention=attention,
        kinds={name: kinds[name] for name in pattern},
        pattern=pattern,
        init_std=0.6,
    )
    with jax.set_mesh(axes):
        model = building.decoder(config, axes)
        params = building.placed_params(config, axes)
        check_generation_equals_forward_pass(model, params, (1, 19, 2, 11), num_rows=2)


@pytest.mark.parametrize(
    ("name", "lowest_rate"), [("gated_delta_net", 0.01), ("kimi_delta_attention", 1)]
)
def test_steps_and_decays_begin_as_published(name, lowest_rate, one_device_mesh):
    sizes = {"num_heads": 400, "num_key_heads": 400, "key_dim": 1, "value_dim": 1}
    if name == "kimi_delta_attention":
        sizes = {"num_heads": 400, "head_dim": 1}
    config = make_config("delta", mixer={"kind": name} | sizes)
    with jax.set_mesh(one_device_mesh):
        specs = param_specs(building.decoder(config, one_device_mesh))
        layer = {"layers": {name: specs["layers"][name]}}
        params = init_params(layer, jax.random.key(0))
    values = jax.tree.map(np.asarray, params["layers"][name])
    steps = np.log10(np.log1p(np.exp(values["dt_bias"].astype(np.float64))))
    assert steps.min() == pytest.approx(-3, abs=0.02)
    assert steps.max() == pytest.approx(-1, abs=0.02)
    assert steps.mean() == pytest.approx(-2, abs=0.1)
    rates = np.exp(values["A_log"])
    assert rates.min() >= lowest_rate
    assert rates.max() == pytest.approx(16, abs=0.2)
    assert rates.mean() == pytest.approx((16 + lowest_rate) / 2, abs=0.6)


def test_small_mixers_keep_their_ratios():
    config = GatedDeltaNetConfig(
        num_heads=32, num_key_heads=16, key_dim=128, value_dim=256
    )
    small = config.shrunk(head_dim=8, seq_len=64)
    assert (small.num_heads, small.num_key_heads) == (4, 2)
    assert (small.key_dim, small.value_dim) == (8, 16)
    kimi = KimiDeltaAttentionConfig(num_heads=32, head_dim=128).shrunk(8, 64)
    assert (kimi.num_heads, kimi.head_dim, kimi.rank) == (4, 8, None)


def test_heads_that_do_not_divide_are_refused():
    message = "num_heads=6 is not a multiple of num_key_heads=4"
    with pytest.raises(MaxlmError, match=message):
        GatedDeltaNetConfig(num_heads=6, num_key_heads=4, key_dim=2, value_dim=2)


def test_a_rank_that_nothing_has_is_refused():
    with pytest.raises(MaxlmError, match="rank=3 with squeezed: false; leave one"):
        KimiDeltaAttentionConfig(num_heads=2, head_dim=5, rank=3, squeezed=False)


@pytest.mark.parametrize("name", MIXERS_BY_NAME)
def test_they_train_on_every_mesh_axis_and_state_their_costs(name, one_device_mesh):
    config = make_config(name)
    assert set(MIXERS.get(MIXERS_BY_NAME[name]["kind"]).mesh_axes) == {
        "context",
        "stage",
    }
    with jax.set_mesh(one_device_mesh):
        model = building.decoder(config, one_device_mesh)
        layer = model.stacks["layers"]
    costs = get_costs(layer.mixer)
    names = {name for group in costs.matrices for name in group.names}
    specs = flatten_names(param_specs(layer.mixer))
    matrices = {name for name, spec in specs.items() if spec.role == "matrix"}
    assert names == matrices
    mixer = MIXERS_BY_NAME[name]
    num_heads = mixer["num_heads"]
    state = num_heads * mixer.get("key_dim", 5) * mixer.get("value_dim", 5)
    # What is written, corrected and read: three products with a state, at least.
    assert costs.extra_flops > 6 * state
    assert costs.exchanged_elements == state + num_heads * mixer.get("key_dim", 5) ** 2
