"""The plan's step time beside measured ones, on this machine's CPU.

    python benchmarks/plan_cpu.py [CASE ...] [--steps N]

Each case runs in a process of its own, with as many virtual devices as its mesh has: the machine's
figures are measured there, the plan is made, then steps are taken and the median is compared.
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

LLAMA = ("model.attention.num_kv_heads=2", "model.remat=none")
CASES = {
    "demo": ("demo", 1, ()),
    "demo, adamw": ("demo", 1, ("optimizer.kind=adamw",)),
    "demo, full remat": ("demo", 1, ("optimizer.kind=adamw", "model.remat=full")),
    "wider": (
        "demo",
        1,
        (
            *("model.d_model=256", "model.attention.num_heads=4", "model.attention.num_kv_heads=4"),
            *("model.mlp.d_ff=1024", "model.vocab_size=8192", "tokenizer.vocab_size=8192"),
            *("data.seq_len=512", "optimizer.kind=adamw"),
        ),
    ),
    "deeper": (
        "demo",
        1,
        (
            *("model.d_model=512", "model.attention.num_heads=8", "model.attention.num_kv_heads=2"),
            *("model.num_layers=8", "model.mlp.d_ff=1376", "data.batch_size=4"),
            *("optimizer.kind=adamw", "model.remat=full"),
        ),
    ),
    "gpt2": ("gpt2", 1, ("data.seq_len=256", "data.batch_size=2", "model.remat=none")),
    "fsdp 8": ("demo", 8, ("mesh.fsdp=8", "data.batch_size=16", "optimizer.kind=adamw")),
    "fsdp 4 × tensor 2": (
        *("demo", 8),
        ("mesh.fsdp=4", "mesh.tensor=2", "data.batch_size=16", "optimizer.kind=adamw"),
    ),
}


def measure(name: str, steps: int) -> None:
    import jax
    import numpy as np

    from maxlm.config import load
    from maxlm.plan.predict import Machine, predict
    from maxlm.programs.setup import set_up
    from maxlm.run import RunConfig
    from maxlm.train.batch import batch_sharding

    run, devices, settings = CASES[name]
    jax.config.update("jax_num_cpu_devices", devices)
    config = load(RunConfig, f"runs/{run}", settings).value
    machine = Machine.of(f"cpux{devices}")
    plan = predict(config, machine)
    setup = set_up(config)
    state, step = setup.init(), setup.step_function()
    data, micro = config.data, config.train.micro_batches
    shape = (micro, data.batch_size // micro, data.seq_len)
    tokens = np.random.default_rng(0).integers(1, config.model.vocab_size, shape, np.int32)
    arrays = {
        "tokens": tokens,
        "targets": tokens,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(data.seq_len, dtype=np.int32), shape),
        "weights": np.ones(shape, np.float32),
    }
    batch = jax.device_put(arrays, batch_sharding(setup.compute, setup.mesh))
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    measured, planned = median(times[2:]), plan.step_seconds or 0.0
    t = plan.time
    assert t is not None
    parts = " ".join(
        f"{1e3 * float(part):8.1f}" for part in (t.products, t.attention, t.traffic, t.exposed)
    )
    print(
        f"{name:<20}{1e3 * planned:>10.1f}{1e3 * measured:>10.1f}{planned / measured - 1:>+9.1%}"
        f"   {parts}   {machine.chip.peak['fp32'] / 1e9:6.1f} {machine.chip.bandwidth / 1e9:6.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are: {', '.join(CASES)}")
    if args.child:
        measure(args.cases[0], args.steps)
        return
    print(
        f"{'ms a step':<20}{'planned':>10}{'measured':>10}{'error':>9}   products, attention, "
        "element-wise, exposed; GFLOP/s, GB/s",
        flush=True,
    )
    for name in args.cases or CASES:
        command = [sys.executable, __file__, name, "--child", "--steps", str(args.steps)]
        subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


if __name__ == "__main__":
    main()
