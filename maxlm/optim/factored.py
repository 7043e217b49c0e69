"""Adafactor: a factored second moment, and no first."""

from typing import Any, NamedTuple

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

    def split(results: Any, count: int) -> tuple[Any, ...]:
        """Makes trees of a tree of tuples."""
        return tuple(
            jax.tree.map(lambda _, r, i=i: r[i], specs, results) for i in range(count)
        )

    def init(params: optax.Params) -> FactoredState:
        def one(spec: ParamSpec, p: jax.Array) -> tuple[Any, Any]:
            if spec.role == "vector":
                return jnp.zeros_like(p, dtype=jnp.float32), optax.MaskedNode()
            columns, rows = (
                jnp.zeros(
                    [1 if d in dims else n for d, n in enumerate(spec.shape)],
                    jnp.float32,
                )
                for dims in get_input_output_dims(spec)
            )
            return rows, columns

        return FactoredState(
            jnp.zeros([], jnp.int32), *split(jax.tree.map(one, specs, params), 2)
        )

    def update(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[Any, FactoredState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        decay = 1.0 - count.astype(jnp.float32) ** -decay_exponent

        def one(
            spec: ParamSpec, g: jax.Array, rows: Any, columns: Any
        ) -> tuple[Any, Any, Any]:
            square = jnp.square(g) + eps
            if spec.role == "vector":
                rows = decay * rows + (1 - decay) * square
                out = g * jax.lax.rsqrt(rows)
            else:
                inputs, outputs = get_input_output_dims(spec)
                rows = decay * rows + (1 - decay) * square.mean(outputs, keepdims=True)
                columns = decay * columns + (1 - decay) * square.mean(
                    inputs, keepdims=True
                )
                share = rows / rows.mean(inputs, keepdims=True)
                out = g * jax.lax.rsqrt(share) * jax.lax.rsqrt(columns)
            own = (d for d, axis in enumerate(spec.axes) if axis != "expert")
            layer = tuple(d for d in own if d >= spec.num_layer_axes)
            rms = jnp.sqrt(jnp.square(out).mean(layer, keepdims=True))
            return out / jnp.maximum(1.0, rms / clip_rms), rows, columns

        out, *moments = split(
            jax.tree.map(one, specs, updates, state.rows, state.columns), 3
        )
        return out, FactoredState(count, *moments)

    return optax.GradientTransformation(init, update)


def _make_adafactor(
    config: OptimizerConfig, specs: Params
) -> optax.GradientTransformation:
    return scale_by_factored_rms(specs, config.decay_exponent)


ADAFACTOR = RegisteredOptimizer(_make_adafactor)
