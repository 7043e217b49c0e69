"""One process of a layout: ``train_worker.py CONFIG DEVICES PORT PROCESS MESH RUN...``.

Trains the named runs one after the other on DEVICES virtual CPU devices of its own; with a PORT
other than 0 it is one of two processes, which meet there.
"""

import sys

import jax

from maxlm.config import load_config
from maxlm.programs.train import train_model
from maxlm.run import RunConfig


def main() -> None:
    config, devices, port, process, mesh, *runs = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", int(devices))
    if port != "0":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    for name in runs:
        run = load_config(RunConfig, config, [f"name={name}", f"mesh={{{mesh}}}"]).value
        trained = train_model(run, say=lambda text: print(text, flush=True))
        assert trained.setup.mesh.size == jax.device_count()
    print("done", flush=True)


if __name__ == "__main__":
    main()
