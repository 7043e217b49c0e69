"""A gather and a scatter over a whole TPU slice, as the compiler compiles them; needs
no TPU.

    python benchmarks/torus_collectives.py [MACHINE ...]

Needs the `tpu` extra. Each collective once as JAX has it and once as maxlm does it
(maxlm/parallel/local.py): the bytes that cross the wire, over those of the collective
itself, which are (n − 1) / n of the matrix, and what the compiler turned it into. 2.00
is an all-reduce.
"""

import argparse
import os
import sys
from math import prod
from typing import Any

MACHINES = ("v5p:2x2x2", "v5p:4x4x2", "v5p:4x4x4", "v5e:16x16", "v6e:8x8")
# Gradients of Llama 2 7B and Llama 3 8B: an FFN's maps, an attention's, the heads.
MATRICES = ((4096, 11008), (14336, 4096), (4096, 4096), (4096, 32000), (4096, 128256))


def count(
    mesh: Any, kind: str, shape: tuple[int, int], *, ours: bool
) -> tuple[float, str]:
    """(wire bytes over the least there can be, what does it), of one bf16 matrix."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import NamedSharding, PartitionSpec

    from maxlm.parallel import local
    from maxlm.plan.compiled.cost import read_compiled_cost

    axes = ("fsdp",)
    rows = PartitionSpec("fsdp")
    split, whole = (axes, ()), ((), ())

    def gather(x: Any) -> Any:
        if ours:
            return local.gather(x, split, whole)
        return lax.all_gather(x, axes, axis=0, tiled=True)

    def scatter(x: Any) -> Any:
        if ours:
            return local.reduce(x, axes, whole, split)
        return lax.psum_scatter(x, axes, scatter_dimension=0, tiled=True)

    ways = mesh.shape["fsdp"]
    run, lead = (gather, 1) if kind == "all-gather" else (scatter, ways)
    global_shape = (shape[0] * lead, shape[1])
    x = jax.ShapeDtypeStruct(
        global_shape, jnp.bfloat16, sharding=NamedSharding(mesh, rows)
    )
    with jax.set_mesh(mesh):
        text = (
            jax.jit(local.map_shards(run, (rows,), rows)).lower(x).compile().as_text()
        )
    cost = read_compiled_cost(text, dict(mesh.shape))
    least = 2 * prod(shape) * (ways - 1) / ways
    kinds = sorted({kind for kind, _ in cost.wire_by_kind_and_axes()})
    return cost.wire_bytes() / least, ", ".join(kinds)


def main() -> None:
    from maxlm.config import MaxlmError
    from maxlm.plan.compiled.program import get_topology_devices
    from maxlm.plan.topology import parse_topology
    from maxlm.sharding import MeshConfig, make_mesh

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("machines", nargs="*", default=MACHINES, metavar="MACHINE")
    args = parser.parse_args()
    # This process only compiles: whatever accelerator is here stays untouched.
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        for machine in args.machines:
            topology = parse_topology(machine)
            mesh = make_mesh(
                MeshConfig(fsdp=topology.devices), get_topology_devices(topology)
            )
            for kind in ("all-gather", "reduce-scatter"):
                for shape in MATRICES:
                    jax_ratio, by = count(mesh, kind, shape, ours=False)
                    ours_ratio, by_own = count(mesh, kind, shape, ours=True)
                    label = f"{machine:<10} {kind:<15} {shape[0]}×{shape[1]}"
                    print(
                        f"{label:<42} jax {jax_ratio:.2f} ({by})   maxlm {ours_ratio:.2f} "
                        f"({by_own})"
                    )
    except MaxlmError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
