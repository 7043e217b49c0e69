"""Mamba's layers compute what the paper says: a float64 NumPy implementation, token by
token, gives the same for packed rows; caches give the same as whole rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.layers.mamba import MambaConfig
from maxlm.models.params import bind, flatten_names, init_params, param_specs
from tests.models import building, reference
from tests.models.building import POSITIONS, SEGMENTS
from tests.models.generation import check_generation_equals_forward_pass

WIDTH = 3
SIZES = {"d_inner": 10, "d_state": 3, "dt_rank": 2, "d_conv": WIDTH}
MIXERS = {
    "mamba": {"bias": True, "conv_bias": False},
    "falcon": {"inner_norms": "weightless", "inner_norm_eps": 0.02},
    "jamba": {"inner_norms": "learned"},
}


def make_config(name: str = "mamba", **changes) -> DecoderConfig:
    settings = {
        "vocab_size": 29,
        "num_layers": 2,
        "d_model": 7,
        "max_seq_len": 64,
        "mixer": {"kind": "mamba", **SIZES, **MIXERS[name]},
        "ffn": "none",
        "norm": {"eps": 1e-4},
        "positions": {"kind": "none"},
    }
    return DecoderConfig.model_validate(settings | changes)


def softplus(x):
    return np.log1p(np.exp(x))


def mixer(x, p, segments, config, model_eps):
    """x [S, D] → [S, D] (Gu & Dao 2023, figure 3 and eq. 2), with parameters p."""
    inner = reference.linear(x, p["input"])
    gate = reference.linear(x, p["gate"])
    eps = config["inner_norm_eps"] or model_eps

    def normalise(vector, name):
        if config["inner_norms"] == "none":
            return vector
        vector = vector / np.sqrt(np.mean(vector**2) + eps)
        if config["inner_norms"] == "learned":
            vector = vector * p[f"{name}_norm"]["scale"]
        return vector

    y = np.zeros_like(inner)
    state = np.zeros((config["d_inner"], config["d_state"]))
    rank = config["dt_rank"]
    for s in range(len(x)):
        if s and segments[s] != segments[s - 1]:
            state[:] = 0
        total = np.array(p.get("conv_bias", np.zeros(config["d_inner"])))
        for lag in range(config["d_conv"]):
            document = segments[max(s - lag, 0) : s + 1]
            if lag <= s and len(set(document)) == 1:
                total += p["conv_weight"][:, -1 - lag] * inner[s - lag]
        u = total / (1 + np.exp(-total))
        latents = u @ p["x_proj"]["kernel"]
        dt = normalise(latents[:rank], "dt") @ p["dt_proj"]["kernel"]
        dt = softplus(dt + p["dt_bias"])
        B = normalise(latents[rank : rank + config["d_state"]], "B")
        C = normalise(latents[rank + config["d_state"] :], "C")
        decay = np.exp(-np.exp(p["A_log"]) * dt[:, None])
        state = decay * state + np.outer(dt * u, B)
        y[s] = state @ C + p["D"] * u
    return reference.linear(y * gate / (1 + np.exp(-gate)), p["out"])


def reference_hidden(config, params, tokens, segments):
    """Hidden states [S, D] of one row."""
    settings = config.model_dump()
    x = params["embedding"]["table"][tokens]
    for index in range(config.num_layers):
        p = reference.layer_of(params["layers"], index)
        y = reference.norms(x, p["attention_norm"], settings["norm"])
        eps = settings["norm"]["eps"]
        x = x + mixer(y, p["mamba"], segments, settings["mixer"], eps)
    return reference.norms(x, params["final_norm"], settings["norm"])


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    [
        "jamba",
        pytest.param("mamba", marks=pytest.mark.more),
        pytest.param("falcon", marks=pytest.mark.more),
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
        assert result == pytest.approx(slope, abs=1e-5 * scale), parameter


@pytest.mark.heavy
def test_generation_equals_the_full_forward_pass(one_device_mesh):
    config = make_config("jamba", init_std=0.6)
    with jax.set_mesh(one_device_mesh):
        model = building.decoder(config, one_device_mesh)
        params = building.placed_params(config, one_device_mesh)
        check_generation_equals_forward_pass(model, params, (1, 19, 2, 11))


def test_steps_and_decays_begin_as_published(one_device_mesh):
    config = make_config(mixer={"kind": "mamba"} | SIZES | {"d_inner": 500})
    with jax.set_mesh(one_device_mesh):
        specs = param_specs(building.decoder(config, one_device_mesh))
        mamba = specs["layers"]["mamba"]
        params = init_params({"layers": {"mamba": mamba}}, jax.random.key(0))
    values = jax.tree.map(np.asarray, params["layers"]["mamba"])
    steps = np.log10(softplus(values["dt_bias"].astype(np.float64)))
    assert steps.min() == pytest.approx(-3, abs=0.02)
    assert steps.max() == pytest.approx(-1, abs=0.02)
    assert steps.mean() == pytest.approx(-2, abs=0.1)
    rates = np.broadcast_to([1.0, 2.0, 3.0], (2, 500, 3))
    np.testing.assert_allclose(np.exp(values["A_log"]), rates, rtol=1e-6)
    assert (values["D"] == 1).all()
    for name, bound in (("conv_weight", WIDTH**-0.5), ("dt_proj", 2**-0.5)):
        drawn = values[name] if name == "conv_weight" else values[name]["kernel"]
        assert 0.97 * bound < np.abs(drawn).max() <= bound


def test_steps_that_do_not_fit_are_refused():
    with pytest.raises(MaxlmError, match=r"dt_min=0\.2 above dt_max=0\.1"):
        MambaConfig(d_inner=4, dt_rank=1, dt_min=0.2)
