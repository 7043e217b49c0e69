"""An image-patch frontend before a decoder, as an external package writes it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import DTypeLike

from maxlm.models.architectures.transformer import Decoder, DecoderConfig
from maxlm.models.layers.linear import Linear
from maxlm.models.params import bind, flatten_names, init_params, param_specs
from maxlm.sharding import AxisRules
from tests.models.building import GPT2

pytestmark = pytest.mark.heavy

PATCH, PATCHES, TOKENS = 15, 4, 7


class ImageDecoder(Decoder):
    """Patches [B, P, patch size] stand before the tokens of their row."""

    def __init__(self, config: DecoderConfig, *, rules: AxisRules, dtype: DTypeLike):
        super().__init__(config, rules=rules, dtype=dtype)
        self.patches = Linear(
            {"latent": PATCH},
            {"embed": config.d_model},
            self.context,
            bias=True,
            std=0.1,
        )

    def embed_image(self, patches: jax.Array, tokens: jax.Array) -> jax.Array:
        seen = self.patches(patches, seq_axis="residual")
        x = jnp.concatenate([seen, self.embedding(tokens)], axis=1)
        return self.embed_inputs(x, places(x.shape[1]))

    def __call__(self, tokens, positions, segment_ids=None, *, patches):
        count = patches.shape[1]
        x = self.embed_image(patches, tokens)
        x, aux = self.forward_embedded(x, places(x.shape[1]), segment_ids)
        return x[:, count:], aux


def places(length: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (2, length))


CONFIG = GPT2.model_copy(update={"embedding_scale": 3.0})
RANDOM = np.random.default_rng(0)
IMAGES = jnp.asarray(RANDOM.normal(size=(2, PATCHES, PATCH)), jnp.float32)
IDS = jnp.asarray(RANDOM.integers(0, 29, (2, TOKENS)), jnp.int32)


@pytest.fixture(scope="module")
def built():
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        model = ImageDecoder(CONFIG, rules=AxisRules(), dtype=jnp.float32)
        yield model, init_params(param_specs(model), jax.random.key(0))


@partial(jax.jit, static_argnums=0)
def loss(model, params, patches):
    bound = bind(model, params)
    hidden, _ = bound(IDS, places(TOKENS), patches=patches)
    logits = jax.nn.log_softmax(bound.logits(hidden[:, :-1]))
    return -jnp.take_along_axis(logits, IDS[:, 1:, None], axis=-1).mean()


def test_patches_and_tokens_are_embedded_as_by_hand(built):
    model, params = built
    flat = {name: np.asarray(value) for name, value in flatten_names(params).items()}
    seen = np.asarray(IMAGES) @ flat["patches.kernel"] + flat["patches.bias"]
    of_tokens = flat["embedding.table"][np.asarray(IDS)]
    both = np.concatenate([seen, of_tokens], axis=1)
    expected = 3 * both + flat["positions.table"][: PATCHES + TOKENS]
    embedded = jax.jit(lambda p: bind(model, p).embed_image(IMAGES, IDS))(params)
    np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_on_tokens_alone_reaches_the_patches_map(built):
    model, params = built
    grads = flatten_names(jax.jit(jax.grad(lambda p: loss(model, p, IMAGES)))(params))
    for name in ("patches.kernel", "patches.bias", "embedding.table"):
        assert float(jnp.abs(grads[name]).max()) > 1e-6, name
    of_images = float(loss(model, params, IMAGES))
    of_brighter_images = float(loss(model, params, IMAGES + 1.0))
    assert of_images != of_brighter_images
