"""Muon: a moment, orthogonalised, on hidden matrices; AdamW on all else."""

from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from maxlm.models.params import Params, ParamSpec
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.kinds import RegisteredOptimizer, get_input_output_dims
from maxlm.optim.moments import scale_by_adam


def _make_muon(config: OptimizerConfig, specs: Params) -> optax.GradientTransformation:
    def dims(spec: ParamSpec) -> MuonDimensionNumbers | optax.MaskedNode:
        if spec.role != "matrix":
            return optax.MaskedNode()
        inputs, outputs = get_input_output_dims(spec)
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    def to_rms(update: jax.Array, spec: ParamSpec) -> jax.Array:
        # An orthogonal [m, n] matrix has a root mean square of 1 / sqrt(max(m, n)).
        fans = (
            prod(spec.shape[d] for d in group) for group in get_input_output_dims(spec)
        )
        return update * (config.update_rms * sqrt(max(fans)))

    matrices = jax.tree.map(
        lambda s: s if s.role == "matrix" else optax.MaskedNode(), specs
    )
    muon = optax.chain(
        scale_by_muon(
            ns_steps=config.ns_steps,
            beta=config.momentum,
            mu_dtype=jnp.float32,
            weight_dimension_numbers=jax.tree.map(dims, specs),
        ),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, matrices)),
    )
    labels = jax.tree.map(
        lambda spec: "muon" if spec.role == "matrix" else "adamw", specs
    )
    return optax.partition(
        {"muon": _in_auto_mode(muon), "adamw": scale_by_adam(config)}, labels
    )


def _in_auto_mode(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Let the compiler lay out what happens inside; updates and state keep their
    layouts."""

    def update(updates, state, params=None):
        del params
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        run: Any = jax.sharding.auto_axes(
            lambda u, s: inner.update(u, s), out_sharding=layouts
        )
        return run(updates, state)

    return optax.GradientTransformation(inner.init, update)


MUON = RegisteredOptimizer(_make_muon)
