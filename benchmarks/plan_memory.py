"""The plan's peak memory and bytes sent beside the compiler's, for many runs on many
machines.

    python benchmarks/plan_memory.py [CASE ...] [--list]

Needs the `tpu` and `cuda` extras. Each case compiles a whole training step for a
machine that is not here, in a process of its own: one to three minutes each, half an
hour for all. GB (1e9) of one device. The first thirteen were known when
maxlm/plan/memory.py was written, the others not; it has no constants for single cases.
"""

import argparse
import json
from statistics import median

from cases import add_cases, chosen, in_child

SP = ("sharding.compute.residual=[context,tensor]",)
WHOLE = ("sharding.storage.embed=null", "sharding.gradients.embed=null")
# Few layers, for quick compiles: a stack of them needs as much beside what it keeps.
FEW = ("model.num_layers=4", "model.vocab_size=8192")
# name → run or model, machine, rows of a batch, mesh, remat, other settings
CASES = {
    "gpt2 none": ("gpt2", "v5e-16", 256, "fsdp=16", "none", ()),
    "gpt2-xl full": ("gpt2_xl", "v5e-64", 512, "fsdp=64", "full", ()),
    "gpt2-medium mlp": ("gpt2_medium", "h100x8", 128, "fsdp=8", "mlp", ()),
    "llama2-7b full": ("llama2_7b", "v5p-64", 128, "fsdp=32", "full", ()),
    "llama2-7b mlp": ("llama2_7b", "v5p-64", 128, "fsdp=32", "mlp", ()),
    "llama2-7b tp 4": ("llama2_7b", "v5p-64", 128, "fsdp=8,tensor=4", "full", SP),
    "llama2-7b v5e": ("llama2_7b", "v5e-256", 1024, "fsdp=256", "full", ()),
    "llama3-8b full": ("llama3_8b", "h100x64", 128, "fsdp=64", "full", ()),
    "llama3-8b hsdp": ("llama3_8b", "h100x64", 128, "data=8,fsdp=8", "attention", ()),
    "llama3-8b matmuls": ("llama3_8b", "v6e-64", 64, "fsdp=64", "matmuls", ()),
    "llama3-70b full": ("llama3_70b", "v5p-128", 128, "fsdp=64", "full", ()),
    "llama3-70b tp 8": ("llama3_70b", "h100x256", 128, "fsdp=32,tensor=8", "full", SP),
    "mixtral full": ("mixtral_8x7b", "v5p-64", 128, "fsdp=32", "full", ()),
    "mixtral ep 8": ("mixtral_8x7b", "v5p-64", 128, "fsdp=4,expert=8", "full", ()),
    "mixtral ep 8 gpu": ("mixtral_8x7b", "h100x64", 128, "fsdp=8,expert=8", "full", ()),
    "llama3-8b ring 4": (
        *("llama3_8b", "v5p-64", 32, "fsdp=8,context=4", "full"),
        ("parallel.context=ring",),
    ),
    "llama3-8b 1f1b 4": (
        *("llama3_8b", "v5p-64", 128, "fsdp=8,stage=4", "full"),
        ("train.micro_batches=8",),
    ),
    "llama2-13b attention": ("llama2_13b", "v6e-256", 512, "fsdp=256", "attention", ()),
    "smollm2 accumulated": (
        *("smollm2_135m", "v5e-16", 512, "fsdp=16", "none"),
        ("train.micro_batches=4",),
    ),
    "llama3-8b tp 4 none": ("llama3_8b", "v5p-64", 32, "fsdp=8,tensor=4", "none", ()),
    "llama3-8b zero-1": (
        *("llama3_8b", "v5p-64", 64, "fsdp=32", "full"),
        (*WHOLE, "sharding.optimizer.embed=fsdp"),
    ),
    "mamba2 full": (
        *("models/mamba2_2_7b", "v5p:2x2x1", 16, "fsdp=4", "full"),
        ("data.seq_len=2048", *FEW),
    ),
    "falcon mamba cp 2": (
        *("models/falcon_mamba_7b", "v5p:2x2x1", 8, "fsdp=2,context=2", "full"),
        ("data.seq_len=4096", *FEW),
    ),
}


def measure(name: str) -> None:
    """Print one case: peak in bytes, planned and compiled, and bytes sent likewise."""
    from maxlm.config.load import load_config
    from maxlm.plan.compiled.program import compile_step, compute_peak_bytes
    from maxlm.plan.machine import Machine
    from maxlm.plan.predict import plan_run
    from maxlm.run.config import RunConfig

    run, on, rows, mesh, remat, more = CASES[name]
    settings = [f"data.batch_size={rows}", f"model.remat={remat}", "mesh.fsdp=1"]
    settings += [f"mesh.{part}" for part in mesh.split(",")]
    path = run if "/" in run else f"runs/{run}"
    config = load_config(RunConfig, path, [*settings, *more]).value
    plan = plan_run(config, Machine.from_name(on))
    step = compile_step(config, on)
    sent = sum(s.sent_bytes for s in plan.collectives)
    peaks = (
        float(plan.memory.total),
        compute_peak_bytes(step.compiled.memory_analysis()),
    )
    print(json.dumps([*peaks, sent, step.read_cost().wire_bytes()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_cases(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = chosen(parser, args, CASES)
    if args.child:
        measure(names[0])
        return
    header = f"{'case':<22}{'machine':<10}{'mesh':<18}{'remat':<11}"
    print(
        f"{header}{'planned':>9}{'compiled':>9}{'error':>7}   "
        f"{'sent':>8}{'compiled':>9}"
    )
    errors = []
    for name in names:
        planned, compiled, sent, wire = in_child(__file__, name)
        _, on, _, mesh, remat, _ = CASES[name]
        errors.append(planned / compiled - 1)
        print(
            f"{name:<22}{on:<10}{mesh:<18}{remat:<11}{planned / 1e9:>9.2f}{compiled / 1e9:>9.2f}"
            f"{errors[-1]:>+7.1%}   {sent / 1e9:>8.2f}{wire / 1e9:>9.2f}",
            flush=True,
        )
    sizes = [abs(error) for error in errors]
    print(f"error of the peak: median {median(sizes):.1%}, worst {max(sizes):.1%}")


if __name__ == "__main__":
    main()
