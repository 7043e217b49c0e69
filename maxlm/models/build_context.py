"""What the layers of a model are built with, beside the config of each."""

from dataclasses import dataclass, field

from jax.typing import DTypeLike

from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules


@dataclass(frozen=True)
class BuildContext:
    """Settings that all layers of a trunk share."""

    rules: AxisRules
    """Compute layout of parameters and activations."""
    dtype: DTypeLike
    """Compute dtype; parameters are declared in fp32."""
    d_model: int
    """Width of the residual stream."""
    num_layers: int
    """Depth of the trunk; the deeper, the smaller ``residual_std``."""
    init_std: float
    """Standard deviation of initial weights."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Methods by which attention and layers are split over devices."""
    layer_numbers: tuple[int, ...] = ()
    """Places in the trunk, from 0 on, of the layers that a module stands for: those of
    a stack."""

    @property
    def residual_std(self) -> float:
        """Standard deviation of initial maps into the residual stream, to which every
        layer adds twice (Radford et al. 2019, §2.3)."""
        return self.init_std * (2 * self.num_layers) ** -0.5
