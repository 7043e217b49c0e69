"""Vectors of a row put in place of some of its tokens' embeddings, on a mesh.

Rows are split over devices as tokens are, and a row's vectors are whole on each device
that has a part of its sequence: a device takes those of its own tokens, and the
gradient of a vector is summed over the devices that split the sequence.
"""

import jax
import jax.numpy as jnp
from jax.sharding import reshard

from maxlm.parallel.local import Dims, get_layout, make_spec, map_shards, reduce


def place_vectors(x: jax.Array, vectors: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns x with vectors in place of some tokens'; reverse-mode differentiable in
    both.

    Args:
        x: [..., S, D], in any layout.
        vectors: [..., N, D].
        numbers: int [..., S]: which of the row's vectors, from 1 on; 0: x's own. Past N
            gives NaN.

    Returns:
        x's shape, dtype and layout.
    """
    layout = get_layout(x)
    numbers = reshard(numbers, make_spec(layout[:-1]))
    vectors = reshard(vectors.astype(x.dtype), make_spec(_get_vector_layout(layout)))
    return _place_vectors(x, vectors, numbers)


def _get_vector_layout(layout: Dims) -> Dims:
    """Returns the layout of vectors [..., N, D] for x [..., S, D]: a row's are whole."""
    *row_axes, _, column_axes = layout
    return (*row_axes, (), column_axes)


@jax.custom_vjp
def _place_vectors(x: jax.Array, vectors: jax.Array, numbers: jax.Array) -> jax.Array:
    def local(x: jax.Array, vectors: jax.Array, numbers: jax.Array) -> jax.Array:
        indices = jnp.maximum(numbers - 1, 0)[..., None]
        rows = jnp.take_along_axis(vectors, indices, axis=-2)
        return jnp.where(numbers[..., None] > 0, rows, x)

    layout = get_layout(x)
    in_specs = (
        make_spec(layout),
        make_spec(_get_vector_layout(layout)),
        make_spec(layout[:-1]),
    )
    return map_shards(local, in_specs, make_spec(layout))(x, vectors, numbers)


def _forward(
    x: jax.Array, vectors: jax.Array, numbers: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return _place_vectors(x, vectors, numbers), (numbers, vectors.shape[-2])


def _backward(
    saved: tuple[jax.Array, int], d_y: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    numbers, num_vectors = saved
    layout = get_layout(d_y)
    vector_layout = _get_vector_layout(layout)
    sequence_axes = layout[-2]

    def local(d_y: jax.Array, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        d_x = jnp.where(numbers[..., None] > 0, 0, d_y)
        # Of each row: a sum for every vector, and before them one for all other tokens.
        *row_shape, length, width = d_y.shape
        rows = d_y.reshape(-1, length, width).astype(jnp.float32)
        flat_numbers = numbers.reshape(-1, length)
        sums = jnp.zeros((len(rows), 1 + num_vectors, width), jnp.float32)
        row_indices = jnp.arange(len(rows))[:, None]
        sums = sums.at[row_indices, flat_numbers].add(rows, mode="drop")
        d_vectors = sums[:, 1:].reshape(*row_shape, num_vectors, width)
        d_vectors = reduce(
            d_vectors.astype(d_y.dtype), sequence_axes, vector_layout, vector_layout
        )
        return d_x, d_vectors

    in_specs = (make_spec(layout), make_spec(layout[:-1]))
    out_specs = (make_spec(layout), make_spec(vector_layout))
    d_x, d_vectors = map_shards(local, in_specs, out_specs)(d_y, numbers)
    return d_x, d_vectors, None


_place_vectors.defvjp(_forward, _backward)
