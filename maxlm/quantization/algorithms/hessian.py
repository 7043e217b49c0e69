"""Statistics of the inputs of a matrix, gathered over calibration tokens.

Each is a pytree to carry through a jitted program, and is updated with inputs
[tokens, C]. Sums are running means in fp32: means of any number of tokens stay of the
size of one token's, so that late tokens count as much as early ones.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.errors import MaxlmError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputHessian:
    """The mean of x xᵀ over tokens: the Hessian of a linear map's mean squared error,
    up to a factor of two."""

    mean: jax.Array
    """fp32 [C, C]"""
    tokens: jax.Array
    """int32: tokens counted so far."""

    @classmethod
    def create(cls, channels: int) -> "InputHessian":
        """Returns the statistic of no tokens."""
        mean = jnp.zeros((channels, channels), jnp.float32)
        return cls(mean, jnp.zeros((), jnp.int32))

    def update(
        self, inputs: jax.Array, is_counted: jax.Array | None = None
    ) -> "InputHessian":
        """Counts inputs [tokens, C], products in full fp32. Rows of which
        ``is_counted`` [tokens] is false, such as padding, are left out."""
        inputs, added = _select_tokens(inputs, is_counted)
        tokens = self.tokens + added
        total = jnp.maximum(tokens, 1).astype(jnp.float32)
        products = jnp.matmul(inputs.T, inputs, precision=jax.lax.Precision.HIGHEST)
        mean = self.mean * (self.tokens / total) + products / total
        return replace(self, mean=mean, tokens=tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputMagnitude:
    """The mean of |x| by channel, which AWQ reads."""

    mean: jax.Array
    """fp32 [C]"""
    tokens: jax.Array
    """int32: tokens counted so far."""

    @classmethod
    def create(cls, channels: int) -> "InputMagnitude":
        """Returns the statistic of no tokens."""
        return cls(jnp.zeros(channels, jnp.float32), jnp.zeros((), jnp.int32))

    def update(
        self, inputs: jax.Array, is_counted: jax.Array | None = None
    ) -> "InputMagnitude":
        """Counts inputs [tokens, C]; see :meth:`InputHessian.update`."""
        inputs, added = _select_tokens(inputs, is_counted)
        tokens = self.tokens + added
        total = jnp.maximum(tokens, 1).astype(jnp.float32)
        mean = self.mean * (self.tokens / total) + jnp.abs(inputs).sum(0) / total
        return replace(self, mean=mean, tokens=tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InputMaximum:
    """The largest |x| by channel, which SmoothQuant reads."""

    maximum: jax.Array
    """fp32 [C]"""
    tokens: jax.Array
    """int32: tokens counted so far."""

    @classmethod
    def create(cls, channels: int) -> "InputMaximum":
        """Returns the statistic of no tokens."""
        return cls(jnp.zeros(channels, jnp.float32), jnp.zeros((), jnp.int32))

    def update(
        self, inputs: jax.Array, is_counted: jax.Array | None = None
    ) -> "InputMaximum":
        """Counts inputs [tokens, C]; see :meth:`InputHessian.update`."""
        inputs, added = _select_tokens(inputs, is_counted)
        maximum = jnp.maximum(self.maximum, jnp.abs(inputs).max(0))
        return replace(self, maximum=maximum, tokens=self.tokens + added)


InputStatistic = InputHessian | InputMagnitude | InputMaximum


def check_statistic(statistic: InputStatistic, name: str) -> None:
    """Checks on the host what was gathered of a map's inputs.

    Args:
        name: the map's, which the error says.

    Raises:
        MaxlmError: no token was counted, or an input was NaN or infinite, or so large
            that its square is.
    """
    if int(statistic.tokens) == 0:
        raise MaxlmError(
            "no calibration token reached this map",
            where=name,
            fix="calibrate on more text, or leave the map as it is",
        )
    if isinstance(statistic, InputMaximum):
        by_channel = np.asarray(statistic.maximum)
    elif isinstance(statistic, InputMagnitude):
        by_channel = np.asarray(statistic.mean)
    else:
        by_channel = np.asarray(jnp.diagonal(statistic.mean))
    channels = np.flatnonzero(~np.isfinite(by_channel))
    if len(channels):
        raise MaxlmError(
            f"inputs are NaN or infinite in {len(channels)} of {len(by_channel)} "
            f"channels, first in channel {channels[0]}",
            where=name,
            fix="calibrate in float32, and check the model's output on this text",
        )


def compute_proxy_loss(errors: jax.Array, hessian: jax.Array) -> jax.Array:
    """Returns tr(E H Eᵀ) of a matrix's errors E [..., R, C] and mean of x xᵀ [..., C,
    C]: the mean over tokens of the squared error of the outputs, summed over them."""
    products = jnp.matmul(errors, hessian, precision=jax.lax.Precision.HIGHEST)
    return (products * errors).sum((-2, -1))


def rescale_hessian(hessian: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns the mean of x xᵀ of inputs that are divided by ``scales`` [C]."""
    return hessian / (scales[:, None] * scales[None, :])


def _select_tokens(
    inputs: jax.Array, is_counted: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns fp32 inputs with zeros for tokens that do not count, and the number of
    those that do. (A product with zero would keep their NaN.)"""
    inputs = inputs.astype(jnp.float32)
    if is_counted is None:
        return inputs, jnp.int32(inputs.shape[0])
    inputs = jnp.where(is_counted[:, None], inputs, 0)
    return inputs, is_counted.sum(dtype=jnp.int32)
