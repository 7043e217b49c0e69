"""Optimizers with a moment or two for each parameter: AdamW and Lion."""

import jax.numpy as jnp
import optax

from maxlm.models.params import Params
from maxlm.optim.config import OptimizerConfig
from maxlm.optim.kinds import RegisteredOptimizer


def scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns Adam's direction (Kingma & Ba 2015, algorithm 1), moments in fp32."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.float32)


def _make_adamw(config: OptimizerConfig, specs: Params) -> optax.GradientTransformation:
    del specs
    return scale_by_adam(config)


def _make_lion(config: OptimizerConfig, specs: Params) -> optax.GradientTransformation:
    del specs
    return optax.scale_by_lion(config.b1, config.b2, mu_dtype=jnp.float32)


ADAMW = RegisteredOptimizer(_make_adamw)
LION = RegisteredOptimizer(_make_lion)
