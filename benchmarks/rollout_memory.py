"""Memory of a training step with rollouts against one without, on the same mesh.

    python benchmarks/rollout_memory.py [--run runs/llama3_8b] [--topology v5p-64]
        [--overrides key=value ...]

Needs the `tpu` extra, and no TPU. Compiled are the training step, and the engine's
decoding and prefilling steps on the trainer's mesh with `shares_params`. While the
engine runs, the train state stays where it is; while the trainer runs, the engine's
caches do. A device's peak of both is that of the larger phase; the ratio to the
training step's alone is given without the caches, which are listed apart. Last comes
an engine with a copy of its own in the compute dtype, whole but for tensor parallelism:
released before the training step (`Engine.release_params`), and kept.
"""

import argparse
from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.config.load import load_config
from maxlm.inference.adapter_slots import AdapterSlots
from maxlm.inference.engine import make_cache_layout
from maxlm.inference.engine_config import EngineConfig
from maxlm.inference.engine_inputs import InputBuilder
from maxlm.inference.model_runner import allocate_state
from maxlm.inference.sequences import ScheduledStep
from maxlm.inference.step import run_step
from maxlm.inference.step_arrays import EngineSpec, StepSizes
from maxlm.models.caches.layout import list_paged_windows
from maxlm.models.params import param_specs
from maxlm.parallel.local import axis_size
from maxlm.plan.compiled.program import compile_step
from maxlm.run.config import RunConfig
from maxlm.run.setup import RunSetup

GIB = 1 << 30


def compute_shard_bytes(tree: Any) -> int:
    """Returns the bytes of each device's share of arrays that need not exist."""
    total = 0
    for x in jax.tree.leaves(tree):
        shape = x.sharding.shard_shape(x.shape)
        total += prod(shape) * x.dtype.itemsize
    return total


def compute_copy_bytes(setup: RunSetup) -> int:
    """Returns the bytes of each device's share of what ``prepare_params`` makes."""
    model: Any = setup.model
    rules = model.rules.model_copy(update={"layers": ()})
    total = 0
    for spec in jax.tree.leaves(param_specs(model)):
        sharding = NamedSharding(setup.mesh, rules.spec(*spec.axes))
        is_cast = spec.role in ("matrix", "table")
        dtype = np.dtype(model.dtype if is_cast else spec.dtype)
        total += prod(sharding.shard_shape(spec.shape)) * dtype.itemsize
    return total


def compile_rollout_step(
    setup: RunSetup, config: EngineConfig, sizes: StepSizes
) -> tuple[jax.stages.Compiled, int]:
    """Compiles a step of the engine; returns it, and a device's bytes of the caches."""
    model: Any = setup.model
    mesh = setup.mesh

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, x.sharding.spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def replicate(x: np.ndarray) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)

    num_shards = prod(mesh.shape[axis] for axis in model.rules.batch)
    windows = list_paged_windows(model, config.cache, 0)
    layout = make_cache_layout(config, windows, num_shards, "tpu", 0)
    vocab_size = model.config.vocab_size
    spec = EngineSpec(
        layout,
        windows,
        config.max_length,
        vocab_size,
        shares_params=config.shares_params,
    )
    params = setup.abstract_state.params
    with jax.set_mesh(mesh):
        spec = replace(
            spec, layout=replace(layout, head_ways=axis_size(model.rules.heads))
        )
        builder = InputBuilder(
            config,
            num_shards,
            vocab_size,
            num_drafts=0,
            all_rows=False,
            adapters=AdapterSlots(model, 0, 1),
        )
        tables = [
            np.zeros(
                (num_shards, config.max_sequences, config.pages_per_sequence), np.int32
            )
            for _ in windows
        ]
        inputs = builder.build(ScheduledStep(), sizes, tables, {})
        state = jax.eval_shape(
            lambda: allocate_state(model, spec.layout, config.max_length)
        )
        state = jax.tree.map(place, state)
        inputs = jax.tree.map(replicate, inputs)
        lowered = run_step.lower(model, spec, sizes, params, state, inputs)
    return lowered.compile(), compute_shard_bytes(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", default="runs/llama3_8b")
    parser.add_argument("--topology", default="v5p-64")
    parser.add_argument("--overrides", nargs="*", default=["train.micro_batches=4"])
    arguments = parser.parse_args()
    config = load_config(RunConfig, arguments.run, arguments.overrides).value
    step = compile_step(config, arguments.topology)
    state_bytes = compute_shard_bytes(step.setup.abstract_state)
    train_peak = step.peak_bytes
    print(f"{arguments.run} on {arguments.topology}, a device:")
    print(f"  train state                     {state_bytes / GIB:8.2f} GiB")
    print(f"  training step                   {train_peak / GIB:8.2f} GiB", flush=True)
    engine = EngineConfig(max_sequences=16, max_length=2048, shares_params=True)
    decoding = StepSizes(16, 1, 0, 0, engine.decode_steps)
    prefilling = StepSizes(16, 1, engine.prefill_tokens, engine.max_chunks, 1)
    peaks: list[int] = []
    for phase, sizes in (("decoding", decoding), ("prefilling", prefilling)):
        compiled, cache_bytes = compile_rollout_step(step.setup, engine, sizes)
        memory = compiled.memory_analysis()
        assert memory is not None
        outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = state_bytes + memory.temp_size_in_bytes + outputs
        peaks.append(peak)
        print(f"  {phase}, without caches".ljust(33), f"{peak / GIB:8.2f} GiB")
    print(f"  caches                          {cache_bytes / GIB:8.2f} GiB")
    copy_bytes = compute_copy_bytes(step.setup)
    print(f"  a copy of the engine's own      {copy_bytes / GIB:8.2f} GiB")
    ratios = {
        "arrays shared": max(*peaks, train_peak),
        "a copy, released": max(max(peaks) + copy_bytes, train_peak),
        "a copy, kept": max(*peaks, train_peak) + copy_bytes,
    }
    for name, peak in ratios.items():
        print(
            f"  a step with rollouts, {name}: {peak / train_peak:.3f}x and the caches"
        )


if __name__ == "__main__":
    main()
