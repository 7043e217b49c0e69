"""Small odd-sized models with random parameters, and batches for them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.caches import CacheLayout, RaggedBatch
from maxlm.models.params import Params, bind, flatten_names, param_specs
from maxlm.sharding import ShardingConfig, resolve_placement
from tests.models.published import read_models

CONFIGS = {
    name: DecoderConfig.model_validate(values)
    for name, values in read_models(Path(__file__).with_name("decoders.yaml")).items()
}
GPT2, LLAMA_GQA, PATTERN = CONFIGS["gpt2"], CONFIGS["llama_gqa"], CONFIGS["pattern"]

# For jax.jit: XLA compiles a model four times as fast when it does not optimise;
# nothing else changes.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"] = False

# Three rows of 11 tokens: one document; two and padding; two. Positions restart with
# each.
SEGMENTS = np.array(
    [[1] * 11, [1] * 4 + [2] * 5 + [0] * 2, [1] * 8 + [2] * 3], np.int32
)
POSITIONS = np.array(
    [[*range(11)], [*range(4), *range(5), 0, 0], [*range(8), *range(3)]],
    np.int32,
)


def decoder(config: DecoderConfig, mesh: Mesh, dtype: Any = jnp.float32) -> Decoder:
    """The model in the default compute layout of ``mesh``."""
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    return Decoder(config, rules=rules, dtype=dtype)


def shardings(specs: Params, mesh: Mesh) -> Params:
    """Every parameter's sharding in the default storage layout of ``mesh``."""
    sizes = dict(mesh.shape)
    rules = ShardingConfig().storage.for_mesh(sizes)
    return jax.tree.map(
        lambda s: NamedSharding(
            mesh, resolve_placement("", s.shape, s.axes, rules, sizes).spec
        ),
        specs,
    )


def random_params(config: DecoderConfig, mesh: Mesh, seed: int = 0) -> Params:
    """Float64 NumPy values far from the initial ones: every scale and bias matters."""
    return draw_params(param_specs(decoder(config, mesh)), seed)


def draw_params(specs: Params, seed: int = 0) -> Params:
    """The same of any model's declarations. Nothing is compiled for them, unlike for
    ``init_params``."""
    rng = np.random.default_rng(seed)

    def draw(path, spec):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return centre + 0.4 * rng.standard_normal(spec.shape).astype(np.float32).astype(
            np.float64
        )

    return jax.tree_util.tree_map_with_path(draw, specs)


def storage(config: DecoderConfig, mesh: Mesh) -> Params:
    return shardings(param_specs(decoder(config, mesh)), mesh)


def on_devices(values: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda x, s: jax.device_put(np.asarray(x, np.float32), s), values, shardings
    )


def change(params: Params, name: str, function: Any) -> Params:
    """Return parameters of which one is what ``of`` makes of it."""
    leaves = [
        function(x) if other == name else x
        for other, x in flatten_names(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def placed_params(config: DecoderConfig, mesh: Mesh) -> Params:
    return on_devices(random_params(config, mesh), storage(config, mesh))


def rows(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """[B, S] arrays in the compute layout of ``mesh``."""
    spec = ShardingConfig().compute.for_mesh(dict(mesh.shape)).spec("batch", "seq")
    return [jax.device_put(a, NamedSharding(mesh, spec)) for a in arrays]


def tokens_and_targets(
    vocab_size: int, shape: tuple[int, int] = SEGMENTS.shape, seed: int = 1
):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, vocab_size, (2, *shape), dtype=np.int32)
    return tokens, targets, rng.random(shape).astype(np.float32)


def batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Tokens of documents that share rows, targets, and weights of 0 for padding."""
    tokens, targets, weights = tokens_and_targets(vocab_size)
    layout = {"positions": POSITIONS, "segments": SEGMENTS}
    return {
        "tokens": tokens,
        **layout,
        "targets": targets,
        "weights": weights * (SEGMENTS > 0),
    }


def placed_batch(vocab_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    arrays = batch(vocab_size)
    return dict(zip(arrays, rows(mesh, *arrays.values()), strict=True))


def loss(
    model: Decoder, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, Any]:
    """Weighted cross-entropy summed over the batch; also hidden states and logits."""
    bound = bind(model, params)
    hidden, _ = bound(batch["tokens"], batch["positions"], batch["segments"])
    logits = bound.logits(hidden)
    labels = jax.nn.one_hot(batch["targets"], logits.shape[-1], dtype=jnp.float32)
    nll = -jnp.sum(jax.nn.log_softmax(logits) * labels, axis=-1)
    return jnp.sum(nll * batch["weights"]), (hidden, logits)


def gradient_step(model: Decoder) -> Any:
    """A jitted ``(params, batch) -> ((loss, (hidden, logits)), gradients)``."""
    step = jax.value_and_grad(lambda p, b: loss(model, p, b), has_aux=True)
    return jax.jit(step, compiler_options=QUICK)


def make_uniform_batch(first: int, count: int, rows: int, length: int) -> Any:
    """Returns the batch of rows' tokens ``first`` to ``first + count`` and the layout
    of caches for it: one page of ``length`` tokens a row, page 0 unused."""
    place = np.arange(first, first + count, dtype=np.int32)
    positions = np.tile(place, rows)[None]
    pages = np.arange(1, rows + 1, dtype=np.int32)
    batch = RaggedBatch(
        positions=positions,
        lengths=positions + 1,
        kv_lengths=np.full((1, rows), first + count, np.int32),
        query_starts=np.arange(rows + 1, dtype=np.int32)[None] * count,
        chunk_rows=np.zeros((1, 0), np.int32),
        page_tables=(pages[None, :, None],),
        slots=((pages[:, None] * length + place).reshape(1, -1),),
        windows=(None,),
        uniform_rows=(rows, count),
    )
    return batch, CacheLayout(1, rows, rows + 1, length)
