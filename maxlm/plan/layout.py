"""A run on a mesh: how its arrays lie there, parameter by parameter, in words, and its
FLOPs; no device is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import jax.numpy as jnp

from maxlm.models.architectures import ModelConfig
from maxlm.models.params import (
    PackedParam,
    Params,
    ParamSpec,
    flatten_names,
    is_packed,
)
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
    """Places every array of a run on a mesh.

    Args:
        sizes: mesh axis → devices.
        links: mesh axis → the links that it runs over, in words.

    Raises:
        MaxlmError: the run does not fit the mesh.
    """
    placed = place_run(config, sizes, jnp.float32)
    work = RunWorkload(config, jnp.float32)
    split = MeshPartitioning(config, sizes)
    specs = flatten_names(placed.specs)
    # A quantized matrix has as many parameters as the numbers that it stands for.
    counted = select_unpacked_specs(placed.specs)
    devices = prod(sizes.values())
    rows = tuple(
        _make_row(name, spec, placed.placements[name], devices)
        for name, spec in specs.items()
    )
    parameter_bytes = sum(row.bytes_per_device for row in rows)
    trained = work.select_trained(work.specs)
    flops = count_training_flops_per_token(work)
    # A token of text is so many of the decoder's, by which FLOPs are counted.
    decoder_tokens_per_token = work.tokens_per_row.decoder / config.data.seq_len
    tokens_per_step = config.data.batch_size * config.data.seq_len
    return RunLayout(
        name=config.name,
        mesh=dict(sizes),
        devices=devices,
        parameters=sum(spec.size for spec in counted.values()),
        active_parameters=round(count_active_parameters(counted, config.model)),
        rows=rows,
        parameter_bytes=parameter_bytes,
        gradient_bytes=round(split.local_bytes(split.gradients, trained)),
        optimizer_bytes=round(split.local_bytes(split.optimizer, work.optimizer)),
        average_bytes=parameter_bytes if config.train.ema_decay is not None else 0,
        tokens_per_step=tokens_per_step,
        tokens_total=tokens_per_step * config.train.steps,
        flops_per_token=flops.causal * decoder_tokens_per_token,
        flops_per_token_full_attention=flops.full * decoder_tokens_per_token,
        notes=tuple(_list_notes(config, placed, sizes, links)),
    )


def _make_row(
    name: str, spec: ParamSpec, placement: Placement, devices: int
) -> ParamRow:
    mesh_axes = []
    for part in placement.spec:
        # A PartitionSpec has None, an axis, or several of them for a dimension.
        mesh_axes.append((part,) if isinstance(part, str) else tuple(part or ()))
    return ParamRow(
        path=name,
        shape=spec.shape,
        dtype=jnp.dtype(spec.dtype).name,
        axes=spec.axes,
        spec=tuple(mesh_axes),
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
    """Yields in words how a run is parallel."""

    def name_axes(axes: tuple[str, ...]) -> str:
        return " · ".join(f"{axis}={sizes[axis]}" for axis in axes)

    rules = placed.compute
    parallel = config.parallel
    used_axes = [axis for axis in MESH_AXES if sizes[axis] > 1]
    if used_axes:
        names = []
        for axis in used_axes:
            name = f"{axis}={sizes[axis]}"
            names.append(f"{name} ({links[axis]})" if links else name)
        order = " → ".join(names)
        yield f"devices, from the slowest links to the fastest: {order}"
    # Parameters, gradients and optimizer state are split that the maths wants whole:
    # ZeRO's stage is the number of them.
    zero_parts = []
    for name, stored in (
        ("parameters", placed.storage),
        ("gradients", placed.gradients),
        ("optimizer state", placed.optimizer),
    ):
        axes = tuple(axis for axis in stored.embed if axis not in rules.embed)
        if axes:
            zero_parts.append(f"{name} over {name_axes(axes)}")
    if zero_parts:
        replicas = f", {sizes['data']} replicas over data" if sizes["data"] > 1 else ""
        yield f"ZeRO-{len(zero_parts)}: {', '.join(zero_parts)}{replicas}"
    sequence_axes = rules.residual[len(rules.seq) :]
    if sequence_axes:
        yield (
            f"sequence parallel: residual stream and norms split over "
            f"{name_axes(sequence_axes)} as well"
        )
    if rules.seq:
        order = "in its own order"
        if parallel.balance_sequence:
            order = "an early and a late part each"
        yield (
            f"context parallel: the sequence over {name_axes(rules.seq)}, {order}; "
            f"attention by {parallel.context}"
        )
    attention = config.model.attention
    has_whole_kv_heads = rules.heads and rules.kv_heads != rules.heads
    if has_whole_kv_heads and attention is not None and not attention.latent:
        yield (
            f"{attention.num_kv_heads} kv heads are whole on every device of "
            f"{name_axes(rules.heads)}, each of which computes them all and reads "
            f"those of its own query heads"
        )
    if sizes["stage"] > 1:
        yield _describe_pipeline(config, sizes["stage"])
    splits_moments = placed.optimizer.embed or placed.optimizer.mlp
    if config.optimizer.kind == "muon" and splits_moments:
        # The compiler gathers what it likes.
        yield (
            "what Muon's orthogonalisation gathers over devices is not among the "
            "bytes sent"
        )


def _describe_pipeline(config: RunConfig, stages: int) -> str:
    parallel = config.parallel
    micro_batches = config.train.micro_batches
    groups = parallel.layer_groups if parallel.schedule == "circular" else 1
    layers = f"{config.model.num_layers // (stages * groups)} layers"
    if groups > 1:
        layers = f"{groups} groups of {layers}"
    idle = bubble_ratio(parallel.schedule, stages, micro_batches, groups)
    return (
        f"pipeline: {parallel.schedule}, {stages} stages of {layers}, "
        f"{micro_batches} micro-batches, {idle:.1%} of the time idle"
    )


class TrainingFlopsPerToken(NamedTuple):
    """Training FLOPs a token, forward and backward."""

    full: float
    """With attention in full, as if nothing were masked (Chowdhery et al. 2022,
    appendix B)."""
    causal: float
    """With causal attention at half, as a kernel computes it."""


def select_unpacked_specs(specs: Params) -> dict[str, ParamSpec]:
    """Returns declarations by name, with those of dense arrays in place of what packed
    ones are stored as."""
    counted: dict[str, ParamSpec] = {}
    for name, spec in flatten_names(specs, is_packed).items():
        counted[name] = spec.dense_spec if isinstance(spec, PackedParam) else spec
    return counted


def count_active_parameters(
    specs: Mapping[str, ParamSpec], config: ModelConfig
) -> float:
    """Counts the parameters that one token meets: all but the routed experts it is not
    sent to."""
    total = 0
    for spec in specs.values():
        is_expert = "expert" in spec.axes
        total += spec.size * (config.active_expert_fraction if is_expert else 1)
    return total


def count_training_flops_per_token(work: RunWorkload) -> TrainingFlopsPerToken:
    """Counts FLOPs a token of a training step, whatever an implementation spends; of an
    encoder and a decoder, a token of the decoder's.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden
    matrices, of routed experts those a token meets, routers and the output head, tied
    or not, but not table look-ups, norms, biases and what an adapter adds. Attention's
    two products, and what layers state beside, take their forward FLOPs and twice as
    many backward.
    """
    outer_size = sum(kernel.size for kernel in work.non_layer_kernels)
    weights = float(outer_size + work.head_passes * work.head.size)
    met_share = work.config.model.active_expert_fraction
    # Forward FLOPs beside weights.
    full = 0.0
    causal = 0.0
    if work.frontend is not None:
        frontend_size = sum(kernel.size for kernel in work.frontend.kernels)
        weights += frontend_size * work.frontend.rows_per_token
        full += work.frontend.extra_flops_per_token
        causal += work.frontend.extra_flops_per_token
    for stack in work.stacks:
        layer_tokens = stack.num_layers * stack.token_ratio
        # Weights that a token is multiplied with.
        for group in stack.matmul_groups:
            met = met_share if group.has_experts else 1
            weights += group.size * stack.num_layers * group.token_ratio * met
        if stack.router is not None:
            weights += stack.router.size * layer_tokens

        # What layers state beside.
        extra_flops = sum(branch.costs.extra_flops for branch in stack.branches)
        full += extra_flops * layer_tokens
        causal += extra_flops * layer_tokens

        # Queries by keys, and scores by values: each 2 FLOPs an element.
        for attention, num_layers in stack.attention_layer_counts.items():
            heads = attention.heads
            width = heads.num_heads * (heads.head_dim + heads.value_dim)
            flops_per_key = 2.0 * width * num_layers * attention.token_ratio
            products = flops_per_key * attention.key_len
            full += products
            causal += products * (0.5 if attention.causal else 1.0)
    # The backward pass takes twice the forward FLOPs.
    weight_flops = 6.0 * weights
    return TrainingFlopsPerToken(
        full=weight_flops + 3 * full, causal=weight_flops + 3 * causal
    )
