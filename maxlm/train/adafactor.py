"""Adafactor's second moment, factored over the matrix that a parameter really is.

Optax factors an array's two largest dimensions. On weights stacked by layer, with heads as a
dimension of their own, those two are an accident of the sizes (even layers can be one); here they
are the inputs and the outputs of each layer's linear map, so that the result does not depend on
how parameters are stored.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm.models.params import Params, ParamSpec


class FactoredState(NamedTuple):
    """fp32 means of squared gradients; reduced dimensions are kept, with size 1."""

    count: jax.Array
    rows: Params
    """Matrices and tables: the mean over output dimensions. Vectors: the full second moment."""
    columns: Params
    """The mean over input dimensions; a ``MaskedNode`` for vectors."""


def get_input_output_dims(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (input, output) dimensions of a matrix or table; layers, experts are neither."""
    inner = [d for d, axis in enumerate(spec.axes) if d >= spec.num_layer_axes and axis != "expert"]
    inputs = spec.contracting_dims or (inner[0],)
    return inputs, tuple(d for d in inner if d not in inputs)


def scale_by_factored_rms(
    specs: Params, decay_exponent: float = 0.8, clip_rms: float = 1.0, eps: float = 1e-30
) -> optax.GradientTransformation:
    """Adafactor without its relative step size (Shazeer & Stern 2018, algorithms 4 and 5).

    At step t the second moment decays by ``1 - t ** -decay_exponent``; each layer's update is
    then scaled down to a root mean square of at most ``clip_rms``.
    """

    def reduced(spec: ParamSpec, dims: tuple[int, ...]) -> jax.Array:
        shape = (1 if d in dims else n for d, n in enumerate(spec.shape))
        return jnp.zeros(tuple(shape), jnp.float32)

    def init(params: optax.Params) -> FactoredState:
        def rows(spec: ParamSpec, p: jax.Array) -> jax.Array:
            if spec.role == "vector":
                return jnp.zeros_like(p, dtype=jnp.float32)
            return reduced(spec, get_input_output_dims(spec)[1])

        def columns(spec: ParamSpec) -> jax.Array | optax.MaskedNode:
            if spec.role == "vector":
                return optax.MaskedNode()
            return reduced(spec, get_input_output_dims(spec)[0])

        return FactoredState(
            count=jnp.zeros([], jnp.int32),
            rows=jax.tree.map(rows, specs, params),
            columns=jax.tree.map(columns, specs),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

        def one(spec: ParamSpec, g: jax.Array, rows: Any, columns: Any) -> tuple[Any, Any, Any]:
            square = jnp.square(g) + eps
            if spec.role == "vector":
                rows = decay * rows + (1 - decay) * square
                out = g * jax.lax.rsqrt(rows)
            else:
                inputs, outputs = get_input_output_dims(spec)
                rows = decay * rows + (1 - decay) * square.mean(outputs, keepdims=True)
                columns = decay * columns + (1 - decay) * square.mean(inputs, keepdims=True)
                share = rows / rows.mean(inputs, keepdims=True)
                out = g * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns)
            own = (d for d, axis in enumerate(spec.axes) if axis != "expert")
            layer = tuple(d for d in own if d >= spec.num_layer_axes)
            rms = jnp.sqrt(jnp.square(out).mean(layer, keepdims=True))
            return out / jnp.maximum(1.0, rms / clip_rms), rows, columns

        results = jax.tree.map(one, specs, updates, state.rows, state.columns)
        out, rows, columns = (
            jax.tree.map(lambda _, r, i=i: r[i], specs, results) for i in range(3)
        )
        return out, FactoredState(count, rows, columns)

    return optax.GradientTransformation(init, update)
