"""A run on a mesh: every check that it fits, how its models and arrays lie there,
parameter by parameter, and its FLOPs; no device is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax.numpy as jnp

from maxlm.models.architectures import ModelConfig
from maxlm.models.params import ParamSpec, flatten_names
from maxlm.parallel.pipeline import bubble_ratio
from maxlm.plan.workload import MeshPartitioning, RunWorkload
from maxlm.run.config import RunConfig
from maxlm.run.model_placement import PlacedModel
from maxlm.run.placement import place_run
from maxlm.sharding import MESH_AXES, Placement


@dataclass(frozen=True)
class ParamRow:
    """One parameter's place; bytes are of its fp32 master copy."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: tuple[tuple[str, ...], ...]
    """Mesh axes of each dimension."""
    rule: str
    bytes_total: int
    bytes_per_device: int
    replicas: int
    """Devices that hold the same piece."""


@dataclass(frozen=True)
class RunLayout:
    """A run on a mesh."""

    name: str
    mesh: dict[str, int]
    devices: int
    parameters: int
    active_parameters: int
    """Parameters that one token meets; fewer with experts."""
    rows: tuple[ParamRow, ...]
    parameter_bytes: int
    """Bytes of fp32 masters on each device between steps, as are the three below."""
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    tokens_per_step: int
    tokens_total: int
    flops_per_token: float
    """Causal attention counts at half; see ``count_training_flops_per_token``."""
    flops_per_token_full_attention: float
    notes: tuple[str, ...]


def compute_run_layout(
    config: RunConfig, sizes: Mapping[str, int], links: Mapping[str, str] | None = None
) -> RunLayout:
    """Places every array of a run on a mesh of given sizes, whose axes run over
    ``links``."""
    placed = place_run(config, sizes, jnp.float32)
    work = RunWorkload(config, jnp.float32)
    split = MeshPartitioning(config, sizes)
    specs = flatten_names(placed.specs)
    devices = prod(sizes.values())
    rows = tuple(
        _row(name, spec, placed.placements[name], devices)
        for name, spec in specs.items()
    )
    parameter_bytes = sum(row.bytes_per_device for row in rows)
    flops = count_training_flops_per_token(work)
    a_token = work.tokens_per_row.decoder / config.data.seq_len
    tokens = config.data.batch_size * config.data.seq_len
    return RunLayout(
        name=config.name,
        mesh=dict(sizes),
        devices=devices,
        parameters=sum(spec.size for spec in specs.values()),
        active_parameters=round(count_active_parameters(specs, config.model)),
        rows=rows,
        parameter_bytes=parameter_bytes,
        gradient_bytes=round(
            split.local_bytes(split.gradients, work.select_trained(work.specs))
        ),
        optimizer_bytes=round(split.local_bytes(split.optimizer, work.optimizer)),
        average_bytes=parameter_bytes if config.train.ema_decay is not None else 0,
        tokens_per_step=tokens,
        tokens_total=tokens * config.train.steps,
        flops_per_token=flops.causal * a_token,
        flops_per_token_full_attention=flops.full * a_token,
        notes=tuple(_list_notes(config, placed, sizes, links)),
    )


def _row(name: str, spec: ParamSpec, placement: Placement, devices: int) -> ParamRow:
    return ParamRow(
        path=name,
        shape=spec.shape,
        dtype=jnp.dtype(spec.dtype).name,
        axes=spec.axes,
        spec=tuple(
            (p,) if isinstance(p, str) else tuple(p or ()) for p in placement.spec
        ),
        rule=placement.rule,
        bytes_total=spec.nbytes,
        bytes_per_device=spec.nbytes // placement.num_shards,
        replicas=devices // placement.num_shards,
    )


def _list_notes(
    config: RunConfig,
    placed: PlacedModel,
    sizes: Mapping[str, int],
    links: Mapping[str, str] | None,
) -> Iterator[str]:
    rules, parallel, attention = placed.compute, config.parallel, config.model.attention

    def ways(axes: tuple[str, ...]) -> str:
        return " · ".join(f"{axis}={sizes[axis]}" for axis in axes)

    if used := [axis for axis in MESH_AXES if sizes[axis] > 1]:
        named = (f"{ways((a,))} ({links[a]})" if links else ways((a,)) for a in used)
        yield f"devices, from the slowest links to the fastest: {' → '.join(named)}"
    # Parameters, gradients and optimizer state are split that the maths wants whole.
    kept = []
    for name, rest in (
        ("parameters", placed.storage),
        ("gradients", placed.gradients),
        ("optimizer state", placed.optimizer),
    ):
        if axes := tuple(axis for axis in rest.embed if axis not in rules.embed):
            kept.append(f"{name} over {ways(axes)}")
    if kept:
        replicas = f", {sizes['data']} replicas over data" if sizes["data"] > 1 else ""
        yield f"ZeRO-{len(kept)}: {', '.join(kept)}{replicas}"
    if more := rules.residual[len(rules.seq) :]:
        yield f"sequence parallel: residual stream and norms split over {ways(more)} as well"
    if rules.seq:
        order = (
            "an early and a late part each"
            if parallel.balance_sequence
            else "in its own order"
        )
        yield (
            f"context parallel: the sequence over {ways(rules.seq)}, {order}; "
            f"attention by {parallel.context}"
        )
    whole_kv_heads = rules.heads and rules.kv_heads != rules.heads
    if whole_kv_heads and attention is not None and not attention.latent:
        yield (
            f"{attention.num_kv_heads} kv heads are whole on every device of "
            f"{ways(rules.heads)}, "
            "each of which computes them all and reads those of its own query heads"
        )
    stages = sizes["stage"]
    micro = config.train.micro_batches
    if stages > 1:
        groups = parallel.layer_groups if parallel.schedule == "circular" else 1
        layers = f"{config.model.num_layers // (stages * groups)} layers"
        held = f"{groups} groups of {layers}" if groups > 1 else layers
        idle = bubble_ratio(parallel.schedule, stages, micro, groups)
        yield (
            f"pipeline: {parallel.schedule}, {stages} stages of {held}, {micro} "
            f"micro-batches, "
            f"{idle:.1%} of the time idle"
        )
    if config.optimizer.kind == "muon" and (
        placed.optimizer.embed or placed.optimizer.mlp
    ):
        # The compiler gathers what it likes.
        yield "what Muon's orthogonalisation gathers over devices is not among the bytes sent"


class TrainingFlopsPerToken(NamedTuple):
    """Training FLOPs a token (forward and backward), causal attention counted in full
    as if nothing were masked (Chowdhery et al. 2022, appendix B), and at half, as a
    kernel computes it."""

    full: float
    causal: float


def count_active_parameters(
    flat: Mapping[str, ParamSpec], config: ModelConfig
) -> float:
    """Counts the parameters that one token meets: all but the routed experts it is not
    sent to."""
    share = config.active_expert_fraction
    return sum(s.size * (share if "expert" in s.axes else 1) for s in flat.values())


def count_training_flops_per_token(work: RunWorkload) -> TrainingFlopsPerToken:
    """Counts FLOPs a token of a training step, whatever an implementation spends; of an
    encoder and a decoder, a token of the decoder's.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden
    matrices, of routed experts those a token meets, routers and the output head, tied
    or not, but not table look-ups, norms, biases and what an adapter adds. Attention's
    two products, and what layers state beside, take their forward FLOPs and twice as
    many backward.
    """
    weights = float(sum(kernel.size for kernel in (*work.non_layer_kernels, work.head)))
    full = causal = 0.0
    for stack in work.stacks:
        tokens = stack.num_layers * stack.token_ratio
        for group in stack.matmul_groups:
            met = work.config.model.active_expert_fraction if group.has_experts else 1
            weights += group.size * stack.num_layers * group.token_ratio * met
        if stack.router is not None:
            weights += stack.router.size * tokens
        other = sum(branch.costs.extra_flops for branch in stack.branches) * tokens
        full, causal = full + other, causal + other
        for own, layers in stack.attention_layer_counts.items():
            width = own.heads.num_heads * (own.heads.head_dim + own.heads.value_dim)
            products = 2.0 * width * layers * own.token_ratio * own.key_len
            full += products
            causal += products * (0.5 if own.causal else 1.0)
    return TrainingFlopsPerToken(
        full=6.0 * weights + 3 * full, causal=6.0 * weights + 3 * causal
    )
