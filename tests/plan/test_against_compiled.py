"""What the plan counts is what the compiled step does: products, bytes sent by kind and
axes."""

from collections import Counter
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from maxlm.plan.communication import list_collectives
from maxlm.plan.compiled.compare import count_step_products
from maxlm.plan.compiled.cost import read_compiled_cost
from maxlm.plan.compiled.program import compute_peak_bytes, make_abstract_batch
from maxlm.plan.memory import count_stored_bytes, estimate_memory
from maxlm.plan.timing import count_frozen_forward_flops
from maxlm.plan.topology import parse_topology
from maxlm.plan.workload import RunWorkload, StepShape
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.sharding import MESH_AXES
from tests.models.building import QUICK
from tests.plan import architectures
from tests.train.cells import CAPACITY, GATED, MODELS

pytestmark = pytest.mark.heavy

# (layout, model, how far bytes sent may be off): scalars and norms weigh in models so
# small, the more with experts, whose routing sends a few numbers a token. `make test`
# tries a few, `make test-more` all others in which a collective or a kind of layer is
# for the first time (architectures.py), `make test-layouts` the rest too.
CASES = (
    ("fsdp × cp ring × tp+sp", "gqa_window", 0.01),
    ("ep × zero2", "moe", 0.03),
    ("fsdp × tp+sp × pp circular", "gqa_window", 0.01),
    ("tp+sp", "lightning", 0.01),
)
MORE = (
    ("fsdp × tp+sp × pp 1f1b", "mha", 0.02),
    ("tp+sp", "latent", 0.03),
    ("cp all-gather", "gqa_window", 0.01),
    ("cp ulysses", "mha", 0.02),
    ("fsdp", "pattern", 0.01),
    ("tp+sp", "kinds", 0.03),
    ("fsdp", "mtp", 0.03),
    ("tp+sp", "encoder_decoder", 0.01),
    ("tp+sp", "mamba2", 0.02),
    ("tp+sp", "kimi_delta_attention", 0.01),
    ("tp+sp", "parallel_heads", 0.01),
    ("tp+sp", "shared_block", 0.02),
    ("cp all-gather", "mamba", 0.01),
    ("cp all-gather", "gated_delta_net", 0.01),
    ("tp+sp", "sparse", 0.03),
)
REST = (
    ("zero1", "gqa_window", 0.01),
    ("zero2", "gqa_window", 0.01),
    ("tp, 8 ways, kv heads whole", "gqa_window", 0.01),
    ("cp ring in order, 8 ways", "gqa_window", 0.01),
    ("ep × fsdp × tp", "moe", 0.03),
    ("tp", "moe capacity", 0.02),
    ("zero2 × pp 1f1b", "gqa_window", 0.03),
    ("tp+sp", "parallel_shared", 0.01),
    ("tp+sp", "encoder", 0.01),
    ("fsdp", "sandwich_experts", 0.01),
    ("ep × fsdp × tp", "gated_experts", 0.03),
    ("fsdp", "latent_experts", 0.01),
    ("tp+sp", "latent_experts", 0.06),
    ("fsdp", GATED, 0.01),
    ("tp+sp", GATED, 0.03),
    *(("tp+sp", name, 0.01) for name in ("mamba", "mamba2_groups", "short_conv")),
    ("tp+sp", "gated_delta_net", 0.01),
    ("tp+sp", "kimi_delta_whole", 0.01),
    ("fsdp", "delta_hybrid", 0.03),
    ("fsdp", "shared_block", 0.03),
    ("cp all-gather", "mamba2", 0.01),
    ("cp all-gather", "kimi_delta_attention", 0.01),
    ("cp all-gather", "lightning", 0.01),
    ("cp all-gather", "short_conv", 0.01),
    ("cp all-gather", "parallel_heads", 0.01),
    ("fsdp × cp ring × tp+sp", "mamba2_groups", 0.01),
    ("fsdp × tp+sp × pp 1f1b", "mamba2", 0.02),
)
# jax 0.10 gathers what leaves a program that is manual over `stage` alone.
OLD = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)


def run(layout: str, model: str, remat: str | None = None) -> RunConfig:
    changes: dict[str, Any] = {}
    if remat is not None:
        changes["remat"] = remat
    if model in architectures.MODELS:
        changes["remat"] = "matmuls"
    if "circular" in layout:
        # Of a group's only layer a compiler drops what a loop must keep.
        changes["num_layers"] = 8
    if model == CAPACITY:
        changes["moe"] = MODELS[model]["moe"] | {"capacity_factor": 1.25}
    return architectures.run(model, layout, **changes)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("fsdp", "sft"),
        pytest.param("tp+sp", "dpo", marks=pytest.mark.more),
        pytest.param("fsdp", "dpo", marks=pytest.mark.slow),
        pytest.param("tp+sp", "sft", marks=pytest.mark.slow),
    ],
)
def test_frozen_base(layout, kind):
    """A frozen kernel has no gradient, no product for it and no bytes to reduce it;
    DPO's reference is the base, whose pass holds less than training."""
    plain = run(layout, "gqa_window", remat="none").model_dump()
    parts = {"task": {"kind": kind}, "adapter": {"kind": "lora", "rank": 4}}
    shape, cost, memory = compiled(RunConfig.model_validate(plain | parts))
    stored_bytes = sum(count_stored_bytes(shape).values())
    assert stored_bytes == pytest.approx(memory.argument_size_in_bytes, rel=1e-3)
    planned_bytes = float(estimate_memory(shape).total)
    assert planned_bytes == pytest.approx(compute_peak_bytes(memory), rel=0.25)
    # The reference's attention counts at half, whatever tiles are skipped.
    products = cost.matmul_flops + cost.attention_flops
    exact = {"sft": 1e-6, "dpo": 0.04}[kind]
    planned = count_step_products(shape).total_flops + count_frozen_forward_flops(shape)
    assert planned == pytest.approx(products, rel=exact)
    if kind == "sft" and layout == "fsdp":
        assert sum(sent(shape).values()) == pytest.approx(cost.wire_bytes(), rel=0.01)


def compiled(config: RunConfig):
    num_devices = prod(getattr(config.mesh, axis) for axis in MESH_AXES)
    setup = set_up_run(config, jax.devices()[:num_devices])
    arguments = setup.abstract_state, make_abstract_batch(setup)
    step: Any = setup.jit_train_step()
    with jax.set_mesh(setup.mesh):
        program = step.__wrapped__.lower(*arguments).compile(compiler_options=QUICK)
    sizes = dict(setup.mesh.shape)
    work = RunWorkload(config, jnp.float32)
    shape = StepShape(
        work,
        sizes,
        config.train.micro_batches,
        config.model.remat,
        parse_topology("cpux8"),
    )
    cost = read_compiled_cost(program.as_text(), sizes)
    return shape, cost, program.memory_analysis()


def sent(shape: StepShape) -> Counter[tuple[str, str]]:
    total: Counter[tuple[str, str]] = Counter()
    sizes = shape.split.sizes
    for collective in list_collectives(shape):
        axes = "+".join(
            axis for axis in sizes if axis in collective.axes and sizes[axis] > 1
        )
        if axes:
            sent_bytes = float(collective.wire_bytes(shape.split))
            total[collective.kind, axes] += sent_bytes
    return total


def gathered_for_top_k(shape: StepShape) -> Counter[tuple[str, str]]:
    """XLA:CPU gathers every token's fp32 scores of experts for a top-k, which it cannot
    split; forward, and once more to differentiate."""
    moe = shape.work.config.model.moe
    sizes = shape.split.sizes
    rules = shape.split.compute
    token_axes = (*rules.batch, *rules.residual)
    axes = [axis for axis in sizes if axis in token_axes and sizes[axis] > 1]
    if moe is None or not axes:
        return Counter()
    others = prod(sizes[axis] for axis in axes) - 1
    one_layer = float(shape.residual_tokens) * moe.num_experts * 4 * others
    sent_bytes = 2 * shape.work.num_expert_layers * one_layer
    return Counter({("all-gather", "+".join(axes)): sent_bytes})


@pytest.mark.parametrize(
    ("layout", "model", "off"),
    [
        *CASES,
        *(pytest.param(*case, marks=pytest.mark.more) for case in MORE),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in REST),
    ],
)
def test_bytes_sent_and_products(layout, model, off):
    if OLD and "pp" in layout:
        pytest.skip("jax 0.10 adds gathers of its own")
    shape, cost, memory = compiled(run(layout, model))
    products = cost.matmul_flops + cost.attention_flops
    ours = sent(shape)
    theirs = Counter(cost.wire_by_kind_and_axes())
    theirs -= gathered_for_top_k(shape)
    assert sum(ours.values()) == pytest.approx(sum(theirs.values()), rel=off)
    large = 0.1 * sum(theirs.values())
    for key in ours | theirs:
        if max(ours[key], theirs[key]) > large:
            assert ours[key] == pytest.approx(theirs[key], rel=3 * off), key
    # Without rotations positions of the batch are unread, which the compiler drops.
    has_rotations = shape.work.config.model.positions.kind == "rope"
    reads_positions = has_rotations and bool(shape.work.attention_layer_counts)
    exact = 1e-3 if reads_positions or model == "mha" else 0.01
    assert sum(count_stored_bytes(shape).values()) == pytest.approx(
        memory.argument_size_in_bytes, rel=exact
    )
    if model in ("lightning", "sparse") or (
        "cp" in layout and model in ("mamba", "gated_delta_net")
    ):
        # Of rows so short and split the states of all runs are most of it.
        planned_bytes = float(estimate_memory(shape).total)
        assert planned_bytes == pytest.approx(compute_peak_bytes(memory), rel=0.25)
    if model == "moe" or "cp" in layout:
        # products in kernels, or of blocks that the mask skips as the program runs
        return
    # Scores of one tile are computed once for two uses; beside maps and attention a
    # decoder beside an encoder makes biases of a table.
    exact = 1e-6
    if model in ("gated_experts", "latent_experts", "delta_hybrid"):
        # The gate is a product with one column; of what makes narrow vectors again a
        # compiler shares some.
        exact = 0.06
    elif model == "mtp":
        # Modules are no scan: the norm behind one makes a map's product again.
        exact = 0.01
    elif model == "encoder_decoder":
        exact = 1e-3
    elif model == "sparse":
        # Of rows that are one tile, whose loop is none, a compiler makes scores once
        # for two uses.
        exact = 0.12
    elif shape.work.is_attention_recomputed(shape.remat):
        exact = 0.05
    assert count_step_products(shape).total_flops == pytest.approx(products, rel=exact)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param("none", marks=pytest.mark.more),
        pytest.param("mlp", marks=pytest.mark.more),
        "full",
    ],
)
def test_every_remat_policy(remat):
    """The peak is a CPU's, whose compiler keeps other copies than a TPU's;
    benchmarks/plan_memory.py has the machines that matter."""
    shape, cost, memory = compiled(run("fsdp", "gqa_window", remat=remat))
    products = cost.matmul_flops + cost.attention_flops
    exact = 0.05 if shape.work.is_attention_recomputed(remat) else 1e-6  # as above
    assert count_step_products(shape).total_flops == pytest.approx(products, rel=exact)
    assert sum(sent(shape).values()) == pytest.approx(cost.wire_bytes(), rel=0.02)
    if remat == "none":
        assert float(estimate_memory(shape).total) == pytest.approx(
            compute_peak_bytes(memory), rel=0.25
        )
