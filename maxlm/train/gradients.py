"""Loss and gradients of a whole batch: micro-batches one after the other, or through a pipeline."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from maxlm.models.aux import Aux
from maxlm.models.params import GatheredParam, Params, bind, get_values
from maxlm.parallel.pipeline import run_1f1b_pipeline

Gradients = tuple[tuple[jax.Array, dict[str, jax.Array]], Params]


def loss_and_gradients(
    model: Any,
    loss: Any,
    params: Params,
    batch: dict[str, jax.Array],
    key: jax.Array,
    layouts: Params | None = None,
) -> Gradients:
    """((loss, sums), gradients), all summed over the batch.

    Args:
        model: the module whose parameters ``params`` holds.
        loss: see ``maxlm.train.step.Loss``.
        batch: arrays [M, B, ...], M micro-batches.
        layouts: each gradient's partition, where it is finer than its parameter's (ZeRO-2);
            gradients are reduced straight to it.
    """
    if layouts is not None:
        whole, params = params, jax.tree.map(reshard, params, layouts)
        loss = _reading(whole, loss)
    schedule = getattr(model, "schedule", None)
    if schedule == "1f1b":
        return _one_f_one_b(model, loss, params, batch, key)

    def summed(params: Params, batch: dict[str, jax.Array], index: Any):
        return loss(bind(model, params), batch, jax.random.fold_in(key, index))

    value_and_grad = jax.value_and_grad(summed, has_aux=True)
    if schedule is not None:
        return value_and_grad(params, batch, 0)
    return _accumulate(value_and_grad, params, batch)


def _reading(whole: Params, loss: Any) -> Any:
    """``loss`` of a model that reads whole parameters, differentiated in its own share of them."""

    def read(model: Any, batch: dict[str, jax.Array], key: jax.Array):
        return loss(bind(model, jax.tree.map(GatheredParam, get_values(model), whole)), batch, key)

    return read


def _accumulate(value_and_grad: Any, params: Params, batch: dict[str, jax.Array]) -> Gradients:
    count = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda a: a[0], batch), jnp.int32(0)
    if count == 1:
        return value_and_grad(params, *first)

    def body(carry, inputs):
        return jax.tree.map(jnp.add, carry, value_and_grad(params, *inputs)), None

    scalars, _ = jax.eval_shape(value_and_grad, params, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), scalars)
    carry = zeros, jax.tree.map(jnp.zeros_like, params)
    return lax.scan(body, carry, (batch, jnp.arange(count)))[0]


def _one_f_one_b(
    model: Any, loss: Any, params: Params, batch: dict[str, jax.Array], key: jax.Array
) -> Gradients:
    """The objective is run twice for each micro-batch, with the layers taken out of the model: up
    to them on the first stage, from them on the last."""
    numbers = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    batch = batch | {"key": jax.random.key_data(keys)}
    ends = {name: value for name, value in params.items() if name != "layers"}

    def objective(ends: Params, micro: dict[str, jax.Array], layers_fn: Any):
        bound = bind(model, ends | {"layers": params["layers"]})
        bound.layers_fn = layers_fn
        micro = dict(micro)
        return loss(bound, micro, jax.random.wrap_key_data(micro.pop("key")))

    def first(ends: Params, micro: dict[str, jax.Array]):
        seen = []

        def catch(x, where):
            seen.append((x, where))
            return x, Aux()

        objective(ends, micro, catch)
        return seen[0]

    def last(ends: Params, y: jax.Array, micro: dict[str, jax.Array]):
        return objective(ends, micro, lambda x, where: (y, Aux()))

    (total, sums, aux), (d_ends, d_layers) = run_1f1b_pipeline(
        first,
        model.stage,
        last,
        ends,
        params["layers"],
        batch,
        sums_cotangent=lambda aux: Aux(jax.tree.map(jnp.ones_like, aux.loss), _zeros(aux.sums)),
    )
    return (total + aux.loss, sums | aux.sums), d_ends | {"layers": d_layers}


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)
