"""Memory of the recipes of configs/tune/ on machines that are not here: planned beside
compiled.

    python benchmarks/tune_memory.py [CASE ...] [--list]

Needs the `tpu` and `cuda` extras. Each case compiles a whole training step of rows of
2,048 tokens, four a device, in a process of its own: two to five minutes each. GB (1e9)
of one device, all of them along `fsdp`; `state` is the optimizer's and the gradients'
bytes beside 12 bytes a trained parameter, both of all devices together where nothing is
held twice.
"""

import argparse
import json
from statistics import median

from cases import add_cases, chosen, in_child

HALF = ("adapter.base_dtype=bfloat16",)
RECIPES = {
    "8b sft": ("llama3_8b_sft", ()),
    "8b sft lora": ("llama3_8b_sft_lora", ()),
    "8b dpo": ("llama3_8b_dpo", ()),
    "8b dpo lora": ("llama3_8b_dpo_lora", ()),
    "70b sft lora": ("llama3_70b_sft_lora", ()),
    "70b dpo lora": ("llama3_70b_dpo_lora", ()),
    "70b sft lora bf16": ("llama3_70b_sft_lora", HALF),
}
MACHINES = {"v5p-64": 32, "h100x8": 8}
"""Name → devices."""
CASES = {f"{recipe} {on}": (recipe, on) for on in MACHINES for recipe in RECIPES}


def measure(name: str) -> None:
    """Print one case: parameters, trained ones, the share of state, bytes planned and
    compiled."""
    from maxlm.config.load import load_config
    from maxlm.plan.compiled.program import compile_step, compute_peak_bytes
    from maxlm.plan.layout import compute_run_layout
    from maxlm.plan.machine import Machine
    from maxlm.plan.predict import plan_run
    from maxlm.run.config import RunConfig
    from maxlm.sharding import MESH_AXES

    recipe, on = CASES[name]
    config, more = RECIPES[recipe]
    settings = [f"data.batch_size={4 * MACHINES[on]}", *more]
    run = load_config(RunConfig, f"tune/{config}", settings).value
    plan = plan_run(run, Machine.from_name(on))
    step = compile_step(run, on)
    work = plan.shape.work
    trained = sum(spec.size for spec in work.select_trained(work.specs))
    alone = compute_run_layout(run, dict.fromkeys(MESH_AXES, 1))
    state = (alone.optimizer_bytes + alone.gradient_bytes) / (12 * trained)
    peaks = (
        float(plan.memory.total),
        compute_peak_bytes(step.compiled.memory_analysis()),
    )
    print(json.dumps([plan.layout.parameters, trained, state, *peaks]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Memory of recipes: planned beside compiled."
    )
    add_cases(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    names = chosen(parser, args, CASES)
    if args.child:
        measure(names[0])
        return
    header = (
        f"{'recipe':<20}{'machine':<9}{'parameters':>15}{'trained':>15}{'state':>7}"
    )
    print(f"{header}{'planned':>9}{'compiled':>9}{'ratio':>7}")
    errors = []
    for name in names:
        parameters, trained, state, planned, compiled = in_child(__file__, name)
        recipe, on = CASES[name]
        errors.append(abs(planned / compiled - 1))
        print(
            f"{recipe:<20}{on:<9}{parameters:>15,}{trained:>15,}{state:>7.3f}"
            f"{planned / 1e9:>9.2f}{compiled / 1e9:>9.2f}{planned / compiled:>7.3f}",
            flush=True,
        )
    print(f"error: median {median(errors):.1%}, worst {max(errors):.1%}")


if __name__ == "__main__":
    main()
