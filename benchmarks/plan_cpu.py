"""The plan's step time beside measured ones, on this machine's CPU.

    python benchmarks/plan_cpu.py [CASE ...] [--seconds S] [--rounds N]

Each case runs in a process of its own, with as many virtual devices as its mesh has:
the machine's figures are measured there, the plan is made, steps are taken for some
seconds; and again. A plan is for a machine left alone, and this one's neighbours take
its cores and its cache, for seconds at a time: so the quicker plan is compared with the
lower quartile of the steps. Their median is beside it. All of it some rounds over: the
worst single one is named, and medians of the rounds are.
"""

import argparse
import json
import time
from statistics import median

from cases import add_cases, chosen, in_child

CASES = {
    "demo": ("demo", 1, ()),
    "demo, adamw": ("demo", 1, ("optimizer.kind=adamw",)),
    "demo, full remat": ("demo", 1, ("optimizer.kind=adamw", "model.remat=full")),
    "wider": (
        "demo",
        1,
        (
            *(
                "model.d_model=256",
                "model.attention.num_heads=4",
                "model.attention.num_kv_heads=4",
            ),
            *(
                "model.mlp.d_ff=1024",
                "model.vocab_size=8192",
                "tokenizer.vocab_size=8192",
            ),
            *("data.seq_len=512", "optimizer.kind=adamw"),
        ),
    ),
    "deeper": (
        "demo",
        1,
        (
            *(
                "model.d_model=512",
                "model.attention.num_heads=8",
                "model.attention.num_kv_heads=2",
            ),
            *("model.num_layers=8", "model.mlp.d_ff=1376", "data.batch_size=4"),
            *("optimizer.kind=adamw", "model.remat=full"),
        ),
    ),
    "narrow": (
        "demo",
        1,
        (
            *(
                "model.d_model=64",
                "model.attention.num_heads=1",
                "model.attention.num_kv_heads=1",
            ),
            *("model.mlp.d_ff=192", "optimizer.kind=adamw"),
        ),
    ),
    "vocabulary 32000": (
        "demo",
        1,
        (
            *(
                "model.vocab_size=32000",
                "tokenizer.vocab_size=32000",
                "data.batch_size=4",
            ),
            "optimizer.kind=adamw",
        ),
    ),
    "sequences of 1024": (
        "demo",
        1,
        (
            *(
                "model.d_model=256",
                "model.attention.num_heads=4",
                "model.attention.num_kv_heads=4",
            ),
            *("model.max_seq_len=1024", "data.seq_len=1024", "data.batch_size=4"),
            "optimizer.kind=adamw",
        ),
    ),
    "4 micro-batches": (
        *("demo", 1),
        ("train.micro_batches=4", "data.batch_size=32", "optimizer.kind=adamw"),
    ),
    "d 384, remat attention": (
        "demo",
        1,
        (
            *(
                "model.d_model=384",
                "model.attention.num_heads=6",
                "model.attention.num_kv_heads=6",
            ),
            *("model.mlp.d_ff=1024", "model.num_layers=6", "model.remat=attention"),
            "optimizer.kind=adamw",
        ),
    ),
    "gpt2": ("gpt2", 1, ("data.seq_len=256", "data.batch_size=2", "model.remat=none")),
    "fsdp 8": (
        "demo",
        8,
        ("mesh.fsdp=8", "data.batch_size=16", "optimizer.kind=adamw"),
    ),
    "fsdp 4 × tensor 2": (
        *("demo", 8),
        ("mesh.fsdp=4", "mesh.tensor=2", "data.batch_size=16", "optimizer.kind=adamw"),
    ),
}


def measure(name: str, seconds: float) -> None:
    import jax
    import numpy as np

    from maxlm.config.load import load_config
    from maxlm.plan.hardware import measure_cpu
    from maxlm.plan.machine import Machine
    from maxlm.plan.predict import plan_run
    from maxlm.run.config import RunConfig
    from maxlm.run.global_batch import batch_sharding
    from maxlm.run.setup import set_up_run

    run, devices, settings = CASES[name]
    jax.config.update("jax_num_cpu_devices", devices)
    config = load_config(RunConfig, f"runs/{run}", settings).value
    setup = set_up_run(config)
    state = setup.init_train_state()
    step = setup.jit_train_step()
    data, micro = config.data, config.train.micro_batches
    shape = (micro, data.batch_size // micro, data.seq_len)
    tokens = np.random.default_rng(0).integers(
        1, config.model.vocab_size, shape, np.int32
    )
    arrays = {
        "tokens": tokens,
        "targets": tokens,
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(data.seq_len, dtype=np.int32), shape),
        "weights": np.ones(shape, np.float32),
    }
    batch = jax.device_put(arrays, batch_sharding(setup.placed.compute, setup.mesh))
    plans, times = [], []
    for _ in range(2):
        measure_cpu.cache_clear()
        plans.append(plan_run(config, Machine.from_name(f"cpux{devices}")))
        taken = []
        first = time.perf_counter()
        while len(taken) < 4 or time.perf_counter() - first < seconds / 2:
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            taken.append(time.perf_counter() - began)
        times += taken[2:]  # one compiles
    plan = min(plans, key=lambda plan: plan.step_seconds)
    t, chip = plan.time, plan.machine.chip
    assert t is not None
    parts = [float(part) for part in (t.products, t.attention, t.traffic, t.exposed)]
    rates = [
        chip.peak_flops["fp32"],
        chip.memory_bandwidth,
        chip.page_allocation_bandwidth,
    ]
    quartile = float(np.quantile(times, 0.25))
    print(json.dumps([plan.step_seconds, quartile, median(times), parts, rates]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_cases(parser)
    parser.add_argument(
        "--seconds",
        type=float,
        default=8,
        help="of steps, of a case in a round; default 8",
    )
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = chosen(parser, args, CASES)
    if args.child:
        measure(names[0], args.seconds)
        return
    print(
        f"{'ms a step':<24}{'planned':>10}{'quartile':>10}{'error':>9}{'median':>10}   "
        f"products, "
        "attention, element-wise, exposed; GFLOP/s, GB/s, GB/s of new memory",
        flush=True,
    )
    measurements: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            planned, measured, middle, parts, rates = in_child(
                __file__, name, "--seconds", str(args.seconds)
            )
            measurements[name].append((planned, measured))
            columns = f"{1e3 * middle:>10.1f}   " + "".join(
                f"{1e3 * part:8.1f}" for part in parts
            )
            columns += "  ;" + "".join(f"{rate / 1e9:8.1f}" for rate in rates)
            print(row(name, planned, measured) + columns, flush=True)
    worst = max(
        abs(planned / taken - 1)
        for pairs in measurements.values()
        for planned, taken in pairs
    )
    print(f"error of the worst single one: {worst:.1%}\nmedians of the rounds")
    errors = []
    for name in names:
        planned, measured = (
            median(column) for column in zip(*measurements[name], strict=True)
        )
        errors.append(abs(planned / measured - 1))
        print(row(name, planned, measured))
    print(f"error: median {median(errors):.1%}, worst {max(errors):.1%}")


def row(name: str, planned: float, measured: float) -> str:
    return f"{name:<24}{1e3 * planned:>10.1f}{1e3 * measured:>10.1f}{planned / measured - 1:>+9.1%}"


if __name__ == "__main__":
    main()
