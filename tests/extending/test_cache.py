"""A cache as an external package writes it: a ring of the last tokens of each row, with
which a model attends as one whose layers have a window."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from pydantic import Field, TypeAdapter

from maxlm.config.sampling import SamplingConfig
from maxlm.inference.engine import Engine, EngineConfig
from maxlm.inference.requests import GenerationRequest
from maxlm.models.caches import CacheArraySpec, CacheLayout
from maxlm.models.caches.config import CACHES, AnyCacheConfig, CacheConfig
from maxlm.models.caches.kinds import KeyValueSizes, RegisteredCache
from maxlm.models.caches.paged import AttentionCache
from maxlm.models.caches.ragged import RaggedBatch, RowTokens, run_rows
from maxlm.models.params import bind, param_specs
from maxlm.parallel.terms import AttentionTerms
from maxlm.sharding import AxisRules
from tests.models.building import LLAMA_GQA, draw_params

pytestmark = pytest.mark.heavy


class RingCacheConfig(CacheConfig):
    """The last tokens of a sequence, in the compute dtype."""

    kind: Literal["test_ring"] = "test_ring"
    length: int = Field(gt=0)
    """Tokens that are kept, the one that attends among them."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache(AttentionCache):
    """Shapes: D shards, R rows, K kv heads, M tokens of the ring, H head dim; n rows
    side by side, G query heads of a kv head."""

    key: jax.Array
    """[D, R, K, M, H]."""
    value: jax.Array
    """[D, R, K, M, H]."""
    positions: jax.Array
    """int32 [D, R, M]: 1 and the token's position; 0: none."""
    length: int = field(metadata={"static": True})

    def attend_shard(
        self,
        q: jax.Array,
        key: jax.Array | None,
        value: jax.Array | None,
        batch: RaggedBatch,
        terms: AttentionTerms,
        *,
        rules: AxisRules,
        value_dim: int | None,
    ) -> tuple[jax.Array, "RingCache"]:
        del rules, value_dim

        def advance(
            cache: RingCache, tokens: tuple[jax.Array, ...], rows: RowTokens
        ) -> tuple[RingCache, jax.Array]:
            # What an earlier sequence left in these rows is none of this one's.
            is_new = rows.begins[:, None]
            cache = replace(cache, positions=jnp.where(is_new, 0, cache.positions))

            def step(cache: RingCache, token: Any) -> tuple[RingCache, jax.Array]:
                (q, key, value), position, live = token
                cache = cache._write(key, value, position, live)
                return cache, cache._attend(q, terms)

            # A token after the other: time first.
            by_time = jax.tree.map(
                lambda x: x.swapaxes(0, 1), (tokens, rows.positions, rows.live)
            )
            cache, y = lax.scan(step, cache, by_time)
            return cache, y.swapaxes(0, 1)

        cache, y = run_rows(advance, self, (q, key, value), batch)
        return y, cache

    def _write(
        self, key: jax.Array, value: jax.Array, position: jax.Array, live: jax.Array
    ) -> "RingCache":
        """Writes key, value [n, K, H] of a token of each row over the oldest."""
        is_place = jnp.arange(self.length) == (position % self.length)[:, None]
        is_place &= live[:, None]
        is_written = is_place[:, None, :, None]
        return replace(
            self,
            key=jnp.where(is_written, key[:, :, None], self.key),
            value=jnp.where(is_written, value[:, :, None], self.value),
            positions=jnp.where(is_place, position[:, None] + 1, self.positions),
        )

    def _attend(self, q: jax.Array, terms: AttentionTerms) -> jax.Array:
        """Attends with q [n, N, H] to all that is kept; returns [n, N, H]."""
        assert terms.scale is not None
        n, N, H = q.shape
        K = self.key.shape[1]
        grouped = q.reshape(n, K, N // K, H)
        scores = terms.scale * jnp.einsum("nkgh,nkmh->nkgm", grouped, self.key)
        is_seen = (self.positions > 0)[:, None, None]
        # A row without a token has none to see: its weights are alike, not NaN.
        weights = jax.nn.softmax(jnp.where(is_seen, scores, -1e30))
        y = jnp.einsum("nkgm,nkmh->nkgh", weights, self.value)
        return y.reshape(n, N, H)


def make_ring_spec(layout: CacheLayout, sizes: KeyValueSizes) -> Any:
    config: Any = layout.cache
    length = min(config.length, sizes.window or config.length)
    shape = (layout.num_shards, layout.num_rows)
    arrays = [
        CacheArraySpec((*shape, sizes.num_kv_heads, length, size), sizes.axes)
        for size in sizes.sizes
    ]
    positions = CacheArraySpec((*shape, length), ("batch", None, None), jnp.int32)
    return RingCache(*arrays, positions, length)  # pyright: ignore


CACHES.register("test_ring", RegisteredCache(RingCacheConfig, make_ring_spec))


@pytest.mark.parametrize("length", [1, pytest.param(5, marks=pytest.mark.more)])
def test_a_model_attends_as_one_with_a_window(length, one_device_mesh):
    """More prompts than rows, in chunks that end anywhere; compared with a forward
    pass of whole sequences."""
    attention = LLAMA_GQA.attention.model_copy(update={"window": length})
    windowed_config = LLAMA_GQA.model_copy(update={"attention": attention})
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(0, 31, size).tolist()) for size in (3, 19, 8)]
    cache = TypeAdapter(AnyCacheConfig).validate_python(
        {"kind": "test_ring", "length": length}
    )
    with jax.set_mesh(one_device_mesh):
        model = LLAMA_GQA.build(rules=AxisRules(), dtype=jnp.float32)
        windowed = windowed_config.build(rules=AxisRules(), dtype=jnp.float32)
        params = jax.tree.map(jnp.float32, draw_params(param_specs(model)))
        config = EngineConfig(
            max_sequences=2, max_length=32, prefill_tokens=8, cache=cache
        )
        engine = Engine(model, params, config)
        sampling = SamplingConfig(temperature=0, max_new_tokens=6)
        requests = [
            GenerationRequest(str(number), prompt, sampling, top_logprobs=0)
            for number, prompt in enumerate(prompts)
        ]
        tokens: dict[str, list[int]] = {}
        logprobs: dict[str, list[float]] = {}
        for output in engine.run(requests):
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            values = [token.logprob for token in output.logprobs]
            logprobs.setdefault(output.request_id, []).extend(values)

        @jax.jit
        def read(text: jax.Array) -> jax.Array:
            bound = bind(windowed, params)
            positions = jnp.arange(32, dtype=jnp.int32)[None]
            return jax.nn.log_softmax(bound.logits(bound(text, positions)[0])[0])

        for number, prompt in enumerate(prompts):
            generated = tokens[str(number)]
            text = np.zeros((1, 32), np.int32)
            text[0, : len(prompt) + 6] = [*prompt, *generated]
            rows = np.asarray(read(text))[len(prompt) - 1 :][:6]
            assert rows.argmax(-1).tolist() == generated
            np.testing.assert_allclose(
                logprobs[str(number)], rows.max(-1), rtol=0, atol=1e-5
            )
