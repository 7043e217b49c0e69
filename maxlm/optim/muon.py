"""Muon: a moment, orthogonalised, on hidden matrices; AdamW on all else."""

from math import prod, sqrt
from typing import cast

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from maxlm.models.params import Params, ParamSpec
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.kinds import RegisteredOptimizer, get_input_output_dims
from maxlm.optim.moments import scale_by_adam


def _make_muon(config: OptimizerConfig, specs: Params) -> optax.GradientTransformation:
    """Makes Muon's direction (Jordan et al. 2024), scaled to AdamW's root mean square
    (arXiv 2502.16982, equation 4)."""

    def get_dimension_numbers(
        spec: ParamSpec,
    ) -> MuonDimensionNumbers | optax.MaskedNode:
        if spec.role != "matrix":
            return optax.MaskedNode()
        inputs, outputs = get_input_output_dims(spec)
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    def scale_to_rms(update: jax.Array, spec: ParamSpec) -> jax.Array:
        # An orthogonal [m, n] matrix has a root mean square of 1 / sqrt(max(m, n)).
        inputs, outputs = get_input_output_dims(spec)
        fan_in = prod(spec.shape[dim] for dim in inputs)
        fan_out = prod(spec.shape[dim] for dim in outputs)
        return update * (config.update_rms * sqrt(max(fan_in, fan_out)))

    matrices = jax.tree.map(
        lambda spec: spec if spec.role == "matrix" else optax.MaskedNode(), specs
    )

    def scale_all_to_rms(
        updates: optax.Updates, params: optax.Params | None = None
    ) -> optax.Updates:
        del params
        return jax.tree.map(scale_to_rms, updates, matrices)

    muon = optax.chain(
        scale_by_muon(
            ns_steps=config.ns_steps,
            beta=config.momentum,
            mu_dtype=jnp.float32,
            weight_dimension_numbers=jax.tree.map(get_dimension_numbers, specs),
        ),
        optax.stateless(scale_all_to_rms),
    )
    labels = jax.tree.map(
        lambda spec: "muon" if spec.role == "matrix" else "adamw", specs
    )
    return optax.partition(
        {"muon": _in_auto_mode(muon), "adamw": scale_by_adam(config)}, labels
    )


def _in_auto_mode(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets the compiler lay out what happens inside; updates and state keep their
    layouts."""

    # Newton-Schulz multiplies whole matrices, whose dimensions may be split in any way:
    # explicit shardings would need a layout at each of its products.
    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        # Its type says that it may return a decorator instead, as without a function.
        run_in_auto_mode = cast(
            optax.TransformUpdateFn,
            jax.sharding.auto_axes(
                lambda updates, state: inner.update(updates, state),
                out_sharding=layouts,
            ),
        )
        return run_in_auto_mode(updates, state)

    return optax.GradientTransformation(inner.init, update)


MUON = RegisteredOptimizer(_make_muon)
