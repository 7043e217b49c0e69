"""Loss and gradients of a whole batch: micro-batches one after the other, or through a pipeline."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import reshard

from maxlm.models.aux import Aux
from maxlm.models.params import GatheredParam, Params, bind
from maxlm.parallel.pipeline import run_1f1b_pipeline
from maxlm.train.trainable import merge_params, split_params

Gradients = tuple[tuple[jax.Array, dict[str, jax.Array]], Params]


def compute_loss_and_gradients(
    model: Any,
    loss: Any,
    params: Params,
    batch: dict[str, jax.Array],
    key: jax.Array,
    layouts: Params | None = None,
    untrained: Params | None = None,
) -> Gradients:
    """((loss, sums), gradients of ``params``), all summed over the batch.

    Args:
        model: the module whose parameters ``params`` and ``untrained`` hold together.
        loss: (bound model, batch, key) -> (loss summed over tokens, sums).
        batch: arrays [M, B, ...], M micro-batches.
        layouts: each gradient's partition, where it is finer than its parameter's (ZeRO-2);
            gradients are reduced straight to it.
        untrained: the parameters that get no gradients.
    """
    trained, whole = params, params
    rest: Params = jax.tree.map(lambda _: None, params) if untrained is None else untrained
    if layouts is not None:
        params = jax.tree.map(reshard, params, layouts)
    schedule = getattr(model, "schedule", None)
    # The 1F1B program differentiates all parameters of a stage.
    if schedule == "1f1b" and jax.tree.leaves(rest):
        params, whole = merge_params(params, rest), merge_params(whole, rest)
        rest = jax.tree.map(lambda _: None, params)

    def bound(params: Params) -> Any:
        if layouts is not None:  # whole parameters are read, their own share is differentiated
            params = jax.tree.map(GatheredParam, params, whole)
        return bind(model, merge_params(params, rest))

    if schedule == "1f1b":
        result, gradients = _one_f_one_b(model, bound, loss, params, batch, key)
        return result, split_params(gradients, trained)[0]

    def summed(params: Params, batch: dict[str, jax.Array], index: Any):
        return loss(bound(params), batch, jax.random.fold_in(key, index))

    value_and_grad = jax.value_and_grad(summed, has_aux=True)
    if schedule is not None:
        return value_and_grad(params, batch, 0)
    return _accumulate(value_and_grad, params, batch)


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
    model: Any, bound: Any, loss: Any, params: Params, batch: dict[str, jax.Array], key: jax.Array
) -> Gradients:
    """The loss is run twice for each micro-batch, with the layers taken out of the model: up
    to them on the first stage, from them on the last."""
    numbers = jnp.arange(jax.tree.leaves(batch)[0].shape[0])
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    batch = batch | {"key": jax.random.key_data(keys)}
    ends = {name: value for name, value in params.items() if name != "layers"}

    def run_loss(ends: Params, micro: dict[str, jax.Array], layers_fn: Any):
        ready = bound(ends | {"layers": params["layers"]})
        ready.layers_fn = layers_fn
        micro = dict(micro)
        return loss(ready, micro, jax.random.wrap_key_data(micro.pop("key")))

    def first(ends: Params, micro: dict[str, jax.Array]):
        seen = []

        def catch(x, where):
            seen.append((x, where))
            return x, Aux()

        run_loss(ends, micro, catch)
        return seen[0]

    def last(ends: Params, y: jax.Array, micro: dict[str, jax.Array]):
        return run_loss(ends, micro, lambda x, where: (y, Aux()))

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
