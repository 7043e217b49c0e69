"""Whether this machine has the kernels for CPUs, which are compiled where they run."""

from jax.sharding import Mesh

from pallas_kernels.cpu import find_missing_compiler, load_kernels


def find_missing_cpu_compiler(mesh: Mesh) -> str | None:
    """Returns the name of the C++ compiler for want of which programs on ``mesh`` go
    without the kernels for CPUs; None: they have them, need none, or the compiler is
    there."""
    if mesh.devices.flat[0].platform != "cpu":
        return None
    compiler = find_missing_compiler()
    # The kernels may have been compiled before.
    return compiler if compiler is not None and load_kernels() is None else None
