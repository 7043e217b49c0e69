"""Hyper-connections: the papers' equations, the residual stream as which they begin, the
engine's steps, and what is refused beside them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.inference.model_runner import allocate_state
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.build_context import BuildContext
from maxlm.models.caches.layout import list_paged_windows
from maxlm.models.hyper_connections import (
    HyperConnection,
    HyperConnectionsConfig,
    normalise_mixing,
)
from maxlm.models.layers.norm import NormConfig
from maxlm.models.params import (
    bind,
    flatten_names,
    init_params,
    is_leaf,
    param_specs,
    take_stacked_layer,
)
from maxlm.models.transforms import build_transformed_model
from maxlm.run.config import RunConfig
from maxlm.sharding import AxisRules
from tests.models import building
from tests.models.building import LLAMA_GQA, QUICK

FORMS = ("static", "dynamic", "constrained")
B, S, N, D = 2, 3, 3, 7


def with_streams(form: str, config: DecoderConfig = LLAMA_GQA, **changes: Any):
    block = {"kind": "hyper_connections", "num_streams": N, "form": form}
    settings = config.model_dump() | {"block": block} | changes
    return DecoderConfig.model_validate(settings)


def read_hidden(config: DecoderConfig, mesh, reset: tuple[str, ...] = ()):
    """Hidden states of a model of initial parameters, some of them 0."""
    model = building.decoder(config, mesh)
    batch = building.batch(config.vocab_size)

    @jax.jit(compiler_options=QUICK)
    def run():
        params = init_params(param_specs(model), jax.random.key(0))
        names = [name for name in flatten_names(params) if name.endswith(reset)]
        for name in names:
            params = building.change(params, name, jnp.zeros_like)
        arrays = [batch[name] for name in ("tokens", "positions", "segments")]
        return bind(model, params)(*map(jnp.asarray, arrays))[0]

    with jax.set_mesh(mesh):
        return np.asarray(run())


@pytest.mark.heavy
@pytest.mark.parametrize(
    "form", ["dynamic", *(pytest.param(f, marks=pytest.mark.more) for f in FORMS[::2])]
)
def test_it_begins_as_one_residual_stream(form, mesh):
    """Eq. 14 of Zhu et al.; constrained, where nothing follows from the streams."""
    plain = LLAMA_GQA.model_copy(update={"norm": NormConfig(eps=1e-12)})
    config = with_streams(form, plain)
    # Constrained weights are alike for all streams where their factors are 0.
    constrained = ("_connection.scales", "streams.scale")
    reset = constrained if form == "constrained" else ()
    ours = read_hidden(config, mesh(), reset)
    np.testing.assert_allclose(ours, read_hidden(plain, mesh()), atol=2e-5)


def compute_reference(x, y, params, eps, *, dynamic):
    """Zhu et al. 2024, eq. 2–5 and 10–13, of one token in float64: x [N, D] is H, y
    [D] a branch's output; returns the branch's input and the streams after it."""
    alpha = params["alpha"]
    read = alpha[:, :1]
    mix = alpha[:, 1:]
    beta = params["beta"][None]
    if dynamic:
        normed = x / np.sqrt((x**2).mean(1, keepdims=True) + eps)
        normed = normed * params["norm"]["scale"]
        kernel = params["kernel"]
        alpha_scale, beta_scale = params["scales"]
        read = alpha_scale * np.tanh(normed @ kernel[:, :1]) + read
        mix = alpha_scale * np.tanh(normed @ kernel[:, 1 : N + 1]) + mix
        beta = beta_scale * np.tanh(normed @ kernel[:, N + 1 :]).T + beta
    return (read.T @ x)[0], beta.T @ y[None] + mix.T @ x


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_connection_is_the_paper_s_with_its_gradients(form, mesh):
    config = HyperConnectionsConfig(form=form, num_streams=N)
    norm = NormConfig(eps=1e-3)
    context = BuildContext(
        AxisRules(), jnp.float32, D, num_layers=2, init_std=0.02, layer_numbers=(1,)
    )
    connection = HyperConnection(config, norm, context, 1)
    rng = np.random.default_rng(0)
    draw = lambda spec: rng.standard_normal(spec.shape)  # noqa: E731
    operands = {
        "params": jax.tree.map(draw, param_specs(connection)),
        "x": rng.standard_normal((B, S, N, D)),
        "y": rng.standard_normal((B, S, D)),
    }
    cotangents = [rng.standard_normal((B, S, D)), rng.standard_normal((B, S, N, D))]

    def compute_exact(operands):
        inputs = np.zeros((B, S, D))
        outputs = np.zeros((B, S, N, D))
        for place in np.ndindex(B, S):
            inputs[place], outputs[place] = compute_reference(
                operands["x"][place],
                operands["y"][place],
                operands["params"],
                norm.eps,
                dynamic=form == "dynamic",
            )
        return inputs, outputs

    def run(operands):
        bound = bind(connection, operands["params"])
        branch = bound.read(operands["x"])
        return branch.x, bound.write(operands["x"], operands["y"], branch)

    single = lambda x: jnp.asarray(x, jnp.float32)  # noqa: E731
    with jax.set_mesh(mesh()):
        results, pull = jax.vjp(run, jax.tree.map(single, operands))
        (gradients,) = pull(tuple(map(single, cotangents)))
    for ours, exact in zip(results, compute_exact(operands), strict=True):
        np.testing.assert_allclose(ours, exact, atol=1e-5 * np.abs(exact).max())

    # Along a direction of each operand: a central difference in float64.
    for name, gradient in flatten_names(gradients).items():
        direction = rng.standard_normal(gradient.shape)
        step = 1e-6

        def shift(path, operand, sign, name=name, direction=direction, step=step):
            if jax.tree_util.keystr(path, simple=True, separator=".") != name:
                return operand
            return operand + sign * step * direction

        totals = []
        for sign in (1, -1):
            shifted = jax.tree_util.tree_map_with_path(
                lambda path, operand, sign=sign, shift=shift: shift(
                    path, operand, sign
                ),
                operands,
            )
            products = map(np.vdot, cotangents, compute_exact(shifted))
            totals.append(sum(products))
        exact = (totals[0] - totals[1]) / (2 * step)
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(np.vdot(gradient, direction) - exact) <= 1e-5 * size, name


@pytest.mark.more
def test_initial_weights_read_one_stream_after_the_other(mesh):
    config = with_streams("static")
    specs = param_specs(building.decoder(config, mesh()))
    params = init_params(specs, jax.random.key(0))
    reads = []
    for layer in range(config.num_layers):
        layer_params = take_stacked_layer(params["layers"], layer)
        for name in ("mixer_connection", "ffn_connection"):
            alpha = np.asarray(layer_params[name]["alpha"])
            np.testing.assert_array_equal(alpha[:, 1:], np.eye(N))
            reads.append(alpha[:, 0].argmax())
            assert alpha[:, 0].sum() == 1
    assert reads == [number % N for number in range(2 * config.num_layers)]


@pytest.mark.more
def test_matrices_that_mix_are_doubly_stochastic():
    logits = np.random.default_rng(0).normal(0, 3, (5, 4, 4)).astype(np.float32)
    matrices = np.asarray(normalise_mixing(jnp.asarray(logits), 200, 1e-9))
    assert (matrices > 0).all()
    np.testing.assert_allclose(matrices.sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(matrices.sum(-2), 1, atol=1e-4)
    # Scaling rows and columns is all that happened: cross-ratios stay.
    ratios = lambda log: log[:, 1:, 1:] - log[:, :1, 1:] - log[:, 1:, :1]  # noqa: E731
    expected = ratios(logits) + logits[:, :1, :1]
    actual = np.log(matrices)
    np.testing.assert_allclose(
        ratios(actual) + actual[:, :1, :1], expected, atol=1e-3, rtol=1e-4
    )


@pytest.mark.more
@pytest.mark.heavy
@pytest.mark.parametrize("form", FORMS)
def test_steps_with_a_cache_equal_the_full_forward_pass(form, mesh):
    """Steps of 6, 2 and 1 tokens of two rows."""
    config = with_streams(form)
    devices = mesh()
    model = building.decoder(config, devices)
    num_rows, length = 2, 9
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (num_rows, length), np.int32)

    @jax.jit(compiler_options=QUICK)
    def run(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        return bind(model, params)(tokens, positions)[0]

    @jax.jit(compiler_options=QUICK)
    def advance(params, tokens, batch, caches):
        windows = list_paged_windows(model)
        batch = replace(batch, windows=windows)
        return bind(model, params).forward_with_cache(tokens, batch, caches)

    with jax.set_mesh(devices):
        params = building.placed_params(config, devices)
        expected = np.asarray(run(params, jnp.asarray(tokens)))
        _, layout = building.make_uniform_batch(0, 1, num_rows, length)
        caches = allocate_state(model, layout, 1).caches
        parts = []
        for first, count in ((0, 6), (6, 2), (8, 1)):
            batch, _ = building.make_uniform_batch(first, count, num_rows, length)
            chunk = jnp.asarray(tokens[:, first : first + count].reshape(1, -1))
            hidden, caches = advance(params, chunk, batch, caches)
            parts.append(np.asarray(hidden).reshape(num_rows, count, -1))
    actual = np.concatenate(parts, 1)
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.more
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_find_the_same_maps_as_without(kind):
    settings = {"kind": kind} | ({"rank": 2} if kind == "lora" else {})

    def list_adapted(config):
        values = {"model": config.model_dump(), "adapter": settings}
        values |= {"data": {"seq_len": 8, "batch_size": 1}, "train": {"steps": 1}}
        adapter = RunConfig.model_validate(values).adapter
        model = build_transformed_model(
            config, [adapter], rules=AxisRules(), dtype=jnp.float32
        )
        leaves = flatten_names(param_specs(model), is_leaf)
        return {name for name, leaf in leaves.items() if is_leaf(leaf)}

    adapted = list_adapted(with_streams("dynamic"))
    assert adapted == list_adapted(LLAMA_GQA)
    assert "layers.attention.key.kernel" in adapted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"placement": "parallel"},
            "model.placement: placement=parallel with block.kind=hyper_connections; "
            "use pre, sandwich or output",
        ),
        (
            {"layer_inputs": {"width": 4}},
            "model.layer_inputs: layer_inputs, which join one stream, with "
            "block.kind=hyper_connections; set one of them to null",
        ),
        (
            {"pattern": [{"ffn_scales": {"stream": 2.0}}]},
            "model.kinds: ffn_scales.stream=2.0 with block.kind=hyper_connections, "
            "which has weights of its own for streams; leave it out",
        ),
    ],
)
def test_what_joins_streams_otherwise_is_refused(changes, message, mesh):
    config = with_streams("static", **changes)
    with pytest.raises(MaxlmError) as caught:
        building.decoder(config, mesh())
    assert str(caught.value) == message
