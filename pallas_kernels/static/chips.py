"""The TPUs whose compiler is asked."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU: a chip, or one of the two cores of a 7x."""

    topology: str
    """The smallest that ``jax.experimental.topologies`` knows."""
    peak_flops: float
    """Of a JAX device, bf16, as the vendor states it, FLOP/s."""
    cores: int
    """TensorCores that share a device (megacore)."""
    mxus: int
    """Matrix units of a core."""
    flops_per_mxu_cycle: int
    """bf16. A 256-wide unit takes two rows a cycle."""

    @property
    def clock(self) -> float:
        """Hz: the one at which every matrix unit, always busy, gives the stated peak."""
        return self.peak_flops / (self.cores * self.mxus * self.flops_per_mxu_cycle)


_MXU_128, _MXU_256 = 2 * 128**2, 2 * 2 * 256**2

CHIPS = {
    "v4": Chip("v4:2x2x1", 2.75e14, 2, 4, _MXU_128),
    "v5e": Chip("v5e:2x2", 1.97e14, 1, 4, _MXU_128),
    "v5p": Chip("v5p:2x2x1", 4.59e14, 2, 4, _MXU_128),
    "v6e": Chip("v6e:2x2", 9.18e14, 1, 2, _MXU_256),
    "7x": Chip("tpu7x:2x2x1", 2.307e15 / 2, 1, 2, _MXU_256),
}
