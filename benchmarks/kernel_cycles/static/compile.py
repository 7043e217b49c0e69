"""Compile one function for a TPU that is not here and leave what was learnt in a
folder.

Run as a process of its own, ``python -m benchmarks.kernel_cycles.static.compile
FOLDER`` with the request as JSON on standard input: libtpu reads ``LIBTPU_INIT_ARGS``,
which names the dump, once a process.
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.kernel_cycles.static.schedule import BUNDLES, REGIONS, UNIT_USE


def environment(folder: Path) -> dict[str, str]:
    """Of the process: JAX on the CPU, libtpu as a compiler only, its dump in
    ``folder``."""
    # Dumps of the passes that are not read would take the compiler as long again.
    passes = "|".join((BUNDLES, REGIONS, UNIT_USE))
    flags = (
        f"--xla_jf_dump_to={folder / 'dump'} --xla_jf_dump_llo_text=true "
        f"--xla_jf_dump_llo_pass_label_regex=.*({passes}).*"
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip(),
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }


def main() -> None:
    request = json.loads(sys.stdin.read())
    folder = Path(sys.argv[1])
    module, _, name = request["function"].partition(":")
    fn, args = getattr(import_module(module), name)(**request["kwargs"])
    compile_into(folder, fn, args, request["topology"])


def compile_into(folder: Path, fn: Any, args: Any, topology: str) -> None:
    """Compile ``fn(*args)``; the schedule goes to the dump, the rest into
    ``folder``."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout

    from benchmarks.kernel_cycles.static.prefetch import kernel_calls

    machine = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    device = machine.devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    # Arguments and results lie as the kernels want them. Into the layout that JAX would
    # give them, which pads no heads of 64, XLA would copy each, and count the copies as
    # temporary memory.
    auto_format = Format(Layout.AUTO, sharding)

    def struct(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype)

    # Pallas lowers some operations by the TPU's generation, which it takes from the
    # mesh.
    mesh = jax.sharding.Mesh(np.array([device]), ("device",)).abstract_mesh
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(fn, in_shardings=auto_format, out_shardings=auto_format).trace(
            *jax.tree.map(struct, tuple(args))
        )
        compiled = traced.lower().compile()
    calls = kernel_calls(traced.jaxpr, jax.tree.leaves(tuple(args)))
    values: dict[str, Any] = {
        f"{i}_{j}": v for i, call in enumerate(calls) for j, v in call.values.items()
    }
    np.savez(folder / "values.npz", **values)
    (folder / "hlo.txt").write_text(compiled.as_text() or "")
    memory: Any = compiled.memory_analysis()
    result = {
        "temp_bytes": memory.temp_size_in_bytes,
        "shapes": [call.shapes for call in calls],
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
