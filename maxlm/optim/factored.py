"""Adafactor: a factored second moment, and no first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm.models.params import Params, ParamSpec
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.kinds import RegisteredOptimizer, get_input_output_dims


class FactoredState(NamedTuple):
    """fp32 means of squared gradients; reduced dimensions are kept, with size 1."""

    count: jax.Array
    rows: Params
    """Matrices and tables: the mean over output dimensions. Vectors: the full second
    moment."""
    columns: Params
    """The mean over input dimensions; a ``MaskedNode`` for vectors."""


def scale_by_factored_rms(
    specs: Params,
    decay_exponent: float = 0.8,
    clip_rms: float = 1.0,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """Adafactor without its relative step size (Shazeer & Stern 2018, algorithms 4 and
    5), factored over the matrix that a parameter really is.

    Optax factors an array's two largest dimensions. On weights stacked by layer, with
    heads as a dimension of their own, those two are an accident of the sizes (even
    layers can be one); here they are the inputs and the outputs of each layer's linear
    map, so that the result does not depend on how parameters are stored.

    At step t the second moment decays by ``1 - t ** -decay_exponent``; each layer's
    update is then scaled down to a root mean square of at most ``clip_rms``.
    """

    def take_part(results: optax.Updates, index: int) -> Params:
        """Makes a tree of one part of the tuple that each parameter has."""
        return jax.tree.map(lambda _, parts: parts[index], specs, results)

    def init_moments(
        spec: ParamSpec, param: jax.Array
    ) -> tuple[jax.Array, jax.Array | optax.MaskedNode]:
        if spec.role == "vector":
            return jnp.zeros_like(param, dtype=jnp.float32), optax.MaskedNode()
        input_dims, output_dims = get_input_output_dims(spec)
        rows_shape = _reduce_shape(spec.shape, output_dims)
        columns_shape = _reduce_shape(spec.shape, input_dims)
        rows = jnp.zeros(rows_shape, jnp.float32)
        columns = jnp.zeros(columns_shape, jnp.float32)
        return rows, columns

    def init(params: optax.Params) -> FactoredState:
        count = jnp.zeros([], jnp.int32)
        moments = jax.tree.map(init_moments, specs, params)
        return FactoredState(count, take_part(moments, 0), take_part(moments, 1))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        assert isinstance(state, FactoredState)
        count = jnp.asarray(optax.safe_increment(state.count))
        decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

        def update_one(
            spec: ParamSpec,
            g: jax.Array,
            rows: jax.Array,
            columns: jax.Array | optax.MaskedNode,
        ) -> tuple[jax.Array, jax.Array, jax.Array | optax.MaskedNode]:
            square = jnp.square(g) + eps
            if spec.role == "vector":
                rows = decay * rows + (1 - decay) * square
                direction = g * jax.lax.rsqrt(rows)
            else:
                assert not isinstance(columns, optax.MaskedNode)
                # The second moment of an element is rows · columns / mean(rows).
                input_dims, output_dims = get_input_output_dims(spec)
                rows = decay * rows + (1 - decay) * square.mean(
                    output_dims, keepdims=True
                )
                columns = decay * columns + (1 - decay) * square.mean(
                    input_dims, keepdims=True
                )
                row_share = rows / rows.mean(input_dims, keepdims=True)
                direction = g * jax.lax.rsqrt(row_share) * jax.lax.rsqrt(columns)
            rms = _compute_layer_rms(direction, spec)
            clipped = direction / jnp.maximum(1.0, rms / clip_rms)
            return clipped, rows, columns

        results = jax.tree.map(update_one, specs, updates, state.rows, state.columns)
        directions = take_part(results, 0)
        rows = take_part(results, 1)
        columns = take_part(results, 2)
        return directions, FactoredState(count, rows, columns)

    return optax.GradientTransformation(init, update)


def _compute_layer_rms(direction: jax.Array, spec: ParamSpec) -> jax.Array:
    """Computes the root mean square of each layer, all of its experts together;
    reduced dimensions are kept, with size 1."""
    layer_dims = tuple(
        dim
        for dim, axis in enumerate(spec.axes)
        if axis != "expert" and dim >= spec.num_layer_axes
    )
    return jnp.sqrt(jnp.square(direction).mean(layer_dims, keepdims=True))


def _reduce_shape(shape: tuple[int, ...], dims: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a shape whose ``dims`` are reduced to 1."""
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


def _make_adafactor(
    config: OptimizerConfig, specs: Params
) -> optax.GradientTransformation:
    return scale_by_factored_rms(specs, config.decay_exponent)


ADAFACTOR = RegisteredOptimizer(_make_adafactor)
