"""What a decoder makes of its inputs: packed rows, padding, ids out of range, bf16, a
cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.inference.model_runner import allocate_state
from maxlm.models.architectures.transformer import DecoderConfig
from maxlm.models.caches.layout import list_paged_windows
from maxlm.models.params import bind
from tests.models import building, reference
from tests.models.building import CONFIGS, GPT2, LLAMA_GQA, POSITIONS, QUICK, SEGMENTS


def forward(config: DecoderConfig, mesh, dtype=jnp.float32):
    """A jitted ``(tokens, positions, segments) -> (hidden, logits)`` of NumPy
    arrays."""
    model = building.decoder(config, mesh, dtype)
    params = building.placed_params(config, mesh)

    @jax.jit(compiler_options=QUICK)
    def run(params, tokens, positions, segments):
        bound = bind(model, params)
        hidden, _ = bound(tokens, positions, segments)
        return hidden, bound.logits(hidden)

    def call(tokens, positions, segments=None):
        arrays = (
            None if a is None else np.asarray(a, np.int32)
            for a in (tokens, positions, segments)
        )
        with jax.set_mesh(mesh):
            placed = [None if a is None else building.rows(mesh, a)[0] for a in arrays]
            return jax.device_get(run(params, *placed))

    return call


@pytest.fixture(scope="module")
def llama(one_device_mesh):
    return forward(LLAMA_GQA, one_device_mesh)


@pytest.fixture(scope="module")
def gpt2(one_device_mesh):
    return forward(GPT2, one_device_mesh)


def test_without_segments_each_row_is_one_document(llama):
    tokens, _, _ = building.tokens_and_targets(23)
    positions = np.broadcast_to(np.arange(11), SEGMENTS.shape)
    bare, _ = llama(tokens, positions)
    ones, _ = llama(tokens, positions, np.ones_like(SEGMENTS))
    np.testing.assert_allclose(bare, ones, atol=1e-6)


@pytest.mark.parametrize(
    ("subject", "bad"),
    [
        ("token", -1),
        ("token", GPT2.vocab_size),
        ("token", 2**31 - 1),
        ("position", -1),
        ("position", GPT2.max_seq_len),
    ],
)
def test_a_token_or_a_position_outside_its_table_gives_nan_in_its_row_alone(
    gpt2, subject, bad
):
    tokens = building.tokens_and_targets(23)[0]
    positions = POSITIONS.copy()
    (tokens if subject == "token" else positions)[1, 3] = bad
    hidden, _ = gpt2(tokens, positions, SEGMENTS)
    assert np.isnan(hidden[1, 3]).all()
    assert np.isfinite(hidden[[0, 2]]).all()


def test_bf16_computes_in_bf16_and_keeps_parameters_and_gradients_in_fp32(
    one_device_mesh,
):
    mesh = one_device_mesh
    values = building.random_params(LLAMA_GQA, mesh)
    with jax.set_mesh(mesh):
        params = building.on_devices(values, building.storage(LLAMA_GQA, mesh))
        step = building.gradient_step(building.decoder(LLAMA_GQA, mesh, jnp.bfloat16))
        batch = building.placed_batch(LLAMA_GQA.vocab_size, mesh)
        (_, (hidden, logits)), grads = step(params, batch)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves((params, grads))} == {
        jnp.dtype(jnp.float32)
    }
    config = LLAMA_GQA.model_dump()
    tokens = np.asarray(batch["tokens"])
    for row in range(len(SEGMENTS)):
        _, exact = reference.decoder(
            config, values, tokens[row], POSITIONS[row], SEGMENTS[row]
        )
        error = np.abs(np.asarray(logits)[row] - exact).max() / np.abs(exact).max()
        assert 1e-5 < error < 5e-2  # neither exact (fp32 by mistake) nor far away


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["llama_gqa", "pattern", "parallel", "relative"])
def test_tokens_fed_in_pieces_through_a_cache_give_the_same_logits(
    name, one_device_mesh
):
    """7 at once, then one by one; unwritten slots of the cache hold large garbage."""
    mesh = one_device_mesh
    config = CONFIGS[name]
    values = building.random_params(config, mesh)
    tokens, _, _ = building.tokens_and_targets(config.vocab_size, (2, 11))
    model = building.decoder(config, mesh)

    @jax.jit(compiler_options=QUICK)
    def advance(params, tokens, batch, caches):
        bound = bind(model, params)
        windows = list_paged_windows(model)
        batch = replace(
            batch,
            windows=windows,
            page_tables=batch.page_tables * len(windows),
            slots=batch.slots * len(windows),
        )
        hidden, caches = bound.forward_with_cache(tokens, batch, caches)
        return bound.logits(hidden), caches

    with jax.set_mesh(mesh):
        params = building.on_devices(values, building.storage(config, mesh))
        _, layout = building.make_uniform_batch(0, 1, 2, config.max_seq_len)
        caches = allocate_state(model, layout, 1).caches
        chunk_logits = []
        caches = jax.tree.map(lambda x: x + 1e3, caches)
        for first, last in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
            batch, _ = building.make_uniform_batch(
                first, last - first, 2, config.max_seq_len
            )
            chunk = tokens[:, first:last].reshape(1, -1)
            logits, caches = advance(params, chunk, batch, caches)
            chunk_logits.append(np.asarray(logits).reshape(2, last - first, -1))
    chunk_logits = np.concatenate(chunk_logits, axis=1)
    for row in range(2):
        _, exact = reference.decoder(
            config.model_dump(), values, tokens[row], np.arange(11), np.ones(11)
        )
        assert np.abs(chunk_logits[row] - exact).max() <= 2e-5 * np.abs(exact).max()
