"""Embeddings are the hidden states of a text alone, pooled, whatever it is embedded
beside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.inference.embedding import Embedder
from maxlm.inference.params import prepare_params
from maxlm.models.architectures.encoder import EncoderConfig
from maxlm.models.params import bind, param_specs
from maxlm.sharding import ShardingConfig
from tests.inference.conftest import CONFIGS, build
from tests.models import building

pytestmark = pytest.mark.heavy

ENCODER = CONFIGS["gpt2"] | {
    "token_types": 2,
    "head_activation": "gelu",
    "max_seq_len": 33,
}
ENCODER["attention"] = {
    **ENCODER["attention"],
    "num_heads": 4,
    "num_kv_heads": 4,
    "head_dim": 6,
    "window": None,
}


def make_rows() -> list[list[int]]:
    """Four texts of several lengths, some of them again."""
    random = np.random.default_rng(0)
    texts = [random.integers(0, 66, size).tolist() for size in (33, 1, 17, 5)]
    return [texts[n] for n in (1, 0, 2, 1, 2, 3, 3, 0, 1, 3, 2)]


def pool(hidden: np.ndarray, pooling: str) -> np.ndarray:
    """Of hidden states [S, D]."""
    vector = {"mean": hidden.mean(0), "last": hidden[-1], "first": hidden[0]}[pooling]
    return vector / np.linalg.norm(vector)


def make_encoder(mesh):
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    model = EncoderConfig(**ENCODER).build(rules=rules, dtype=jnp.float32)
    specs = param_specs(model)
    values = jax.tree.map(
        lambda s: np.random.default_rng(s.shape).normal(0.3, 0.5, s.shape), specs
    )
    return model, building.on_devices(values, building.shardings(specs, mesh))


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("encoder", marks=pytest.mark.more)]
)
def test_rows_are_what_they_are_alone(name, mesh, one_device_mesh):
    def make(where):
        with jax.set_mesh(where):
            if name == "encoder":
                return make_encoder(where)
            tiny = build(CONFIGS["llama"], where)
            return tiny.model, tiny.params

    @jax.jit
    def compute_states(params, tokens):  # not padded, nothing masked
        bound = bind(model, params)
        forward = bound.forward_without_head if name == "encoder" else bound
        return forward(tokens, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None])[0][0]

    rows = make_rows()
    model, params = make(one_device_mesh)
    with jax.set_mesh(one_device_mesh):
        states = [
            np.asarray(compute_states(params, np.array([r], np.int32))) for r in rows
        ]
    split = mesh(fsdp=2, tensor=2)
    split_model, split_params = make(split)
    # There as the engine lays parameters out: a layer at a time.
    apart = Embedder(split_model, prepare_params(split_model, split_params), split, 33)
    embedder = Embedder(model, params, one_device_mesh, 33)
    for pooling in ("mean", "last", "first"):
        expected = [pool(hidden, pooling) for hidden in states]
        np.testing.assert_allclose(embedder.embed(rows, pooling), expected, atol=2e-5)
    usual = {"llama": "last", "encoder": "mean"}[name]
    expected = [pool(hidden, usual) for hidden in states]
    np.testing.assert_allclose(apart.embed(rows), expected, atol=2e-5)
    np.testing.assert_array_equal(
        embedder.embed(rows[:3]), embedder.embed(rows[:3], usual)
    )


def test_few_shapes_are_compiled(tinies, one_device_mesh):
    tiny = tinies["llama"]
    embedder = Embedder(tiny.model, tiny.params, one_device_mesh, 48)
    for size in range(1, 49):
        embedder.embed([[1] * size] * (size % 7 + 2))
        embedder.embed([[1] * size])
    assert len(embedder._programs) <= 6  # widths of 16, 32 and 48; one row and eight
    # While others wait, texts go one by one: the same programs and vectors.
    rows = [[1] * size for size in (3, 40, 20, 4)]
    expected = embedder.embed(rows)
    batches = [*embedder.iterate_batches(rows, lambda: True)]
    assert [indices for indices, _, _ in batches] == [[1], [2], [3], [0]]
    for (index,), tokens, lengths in batches:
        assert tokens.shape[0] == 1
        vector = embedder.compile_program(tokens.shape)(tokens, lengths)[0]
        np.testing.assert_allclose(vector, expected[index], atol=1e-6)
    assert len(embedder._programs) <= 6


def test_a_split_sequence_is_refused(tinies, mesh):
    tiny = tinies["llama"]
    with pytest.raises(MaxlmError, match="context=1"):
        Embedder(tiny.model, tiny.params, mesh(context=2), 48)
