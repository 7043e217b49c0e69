"""Promise: a cache changes how logits are computed, not what they are."""

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.inference.decode import cast_params, decode, prefill
from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import flatten_names


def test_cached_logits_equal_uncached_ones_at_every_step(tiny):
    texts = np.random.default_rng(0).integers(0, 66, (3, 23))
    lengths = np.array([1, 9, 5], np.int32)
    padded = np.where(np.arange(11) < lengths[:, None], texts[:, :11], 13).astype(np.int32)
    full = [tiny.logits(text) for text in texts]
    assert full[0].std() > 1  # far enough apart for the comparison to mean something

    start = jax.jit(lambda p, t, n: prefill(tiny.model, p, t, n, cache_length=24))
    step = jax.jit(lambda p, t, i, c: decode(tiny.model, p, t, i, c))
    logits, cache = start(tiny.params, padded, lengths)
    positions = lengths
    for _ in range(14):
        assert logits.dtype == jnp.float32
        for row, position in enumerate(positions):
            np.testing.assert_allclose(logits[row], full[row][position - 1], rtol=0, atol=2e-5)
        fed = np.array([texts[row, position] for row, position in enumerate(positions)])
        logits, cache = step(tiny.params, fed.astype(np.int32), positions, cache)
        positions = positions + 1


def test_cast_once_equals_cast_at_every_use_and_copies_nothing_in_vain(llama):
    model = Decoder(llama.model.config, rules=llama.model.rules, dtype=jnp.bfloat16)
    once = cast_params(model, llama.params)
    assert {str(v.dtype) for v in flatten_names(once).values()} == {"bfloat16", "float32"}
    tokens, lengths = np.array([[1, 2, 3, 4, 5]], np.int32), np.array([5], np.int32)
    run = jax.jit(lambda p: prefill(model, p, tokens, lengths, cache_length=8))
    (a, cache), (b, _) = run(llama.params), run(once)
    assert cache["layers"][0].key.dtype == jnp.bfloat16
    np.testing.assert_array_equal(a, b)
    cast, own = flatten_names(cast_params(llama.model, llama.params)), flatten_names(llama.params)
    for name, value in cast.items():
        assert value.unsafe_buffer_pointer() == own[name].unsafe_buffer_pointer()
