"""What a kind of optimizer is.

To add one, write its direction in a file here, make a :class:`RegisteredOptimizer` of
it and name it in ``OPTIMIZERS`` (maxlm/optim/config.py), or register it from outside:
``OPTIMIZERS.register("kind", RegisteredOptimizer(...))``, or an installed package's
entry point of the group ``maxlm.optimizers``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from maxlm.models.params import Params, ParamSpec
from maxlm.optim.config import OptimizerConfig


@dataclass(frozen=True)
class RegisteredOptimizer:
    """An optimizer by its kind.

    Args:
        make_direction: called with (config, declarations of the trained parameters);
            returns the transformation of clipped gradients into a direction. Weight
            decay and the learning rate are applied to what it returns.
        config: its settings; a subclass where it has settings of its own.
    """

    # Any: each kind's function takes its own subclass of OptimizerConfig.
    make_direction: Callable[[Any, Params], optax.GradientTransformation]
    config: type[OptimizerConfig] = OptimizerConfig


def get_input_output_dims(spec: ParamSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns (input, output) dimensions of a matrix or table; layers, experts are
    neither."""
    matrix_dims = [
        dim
        for dim, axis in enumerate(spec.axes)
        if dim >= spec.num_layer_axes and axis != "expert"
    ]
    # A table's inputs are its rows, the first dimension.
    input_dims = spec.contracting_dims or (matrix_dims[0],)
    output_dims = tuple(dim for dim in matrix_dims if dim not in input_dims)
    return input_dims, output_dims
