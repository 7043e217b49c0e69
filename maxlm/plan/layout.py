"""How a run's arrays lie on a mesh, parameter by parameter, and its model's FLOPs; no device is
needed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax.numpy as jnp

from maxlm.models.architectures import ModelConfig
from maxlm.models.params import ParamSpec, flatten_names
from maxlm.plan.fit import place_run
from maxlm.plan.notes import list_layout_notes
from maxlm.plan.workload import MeshSplit, RunWorkload
from maxlm.run import RunConfig
from maxlm.sharding import Placement


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
    """The rules that matched."""
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
    """Those that one token meets; fewer with experts."""
    rows: tuple[ParamRow, ...]
    parameter_bytes: int
    """Per device, like the two below: fp32 master parameters, ..."""
    gradient_bytes: int
    """... their gradients, ..."""
    optimizer_bytes: int
    """... the optimizer's state, ..."""
    average_bytes: int
    """... and the parameters' moving average, where one is kept."""
    tokens_per_step: int
    tokens_total: int
    flops_per_token: float
    """Training, of a token of text, causal attention counted at half; see count_training_flops."""
    flops_per_token_full_attention: float
    notes: tuple[str, ...]
    """How the run is parallel, in words."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lay_out_run(
    config: RunConfig, sizes: Mapping[str, int], links: Mapping[str, str] | None = None
) -> RunLayout:
    """Place every array of a run on a mesh of given sizes.

    Args:
        links: what each mesh axis runs over, where devices are at hand.

    Raises:
        MaxlmError: an axis that does not divide, two on one mesh axis, a batch that does not
            divide, too much unsharded.
    """
    placed = place_run(config, sizes, jnp.float32)
    work, split = RunWorkload.of(config, jnp.float32), MeshSplit(config, sizes)
    specs, devices = flatten_names(placed.specs), prod(sizes.values())
    rows = tuple(_row(name, specs[name], placed.placements[name], devices) for name in specs)
    parameter_bytes = sum(row.bytes_per_device for row in rows)
    gradients = split.held_bytes(split.gradients, work.select_trained(work.specs))
    flops = count_training_flops(work)
    a_token = work.rows.own / config.data.seq_len
    tokens = config.data.batch_size * config.data.seq_len
    return RunLayout(
        name=config.name,
        mesh=dict(sizes),
        devices=devices,
        parameters=sum(spec.size for spec in specs.values()),
        active_parameters=round(count_active_parameters(specs, config.model)),
        rows=rows,
        parameter_bytes=parameter_bytes,
        gradient_bytes=round(gradients),
        optimizer_bytes=round(split.held_bytes(split.optimizer, work.optimizer)),
        average_bytes=parameter_bytes if config.train.ema_decay is not None else 0,
        tokens_per_step=tokens,
        tokens_total=tokens * config.train.steps,
        flops_per_token=flops.causal * a_token,
        flops_per_token_full_attention=flops.full * a_token,
        notes=tuple(list_layout_notes(config, placed, sizes, links)),
    )


def _row(name: str, spec: ParamSpec, placement: Placement, devices: int) -> ParamRow:
    return ParamRow(
        path=name,
        shape=spec.shape,
        dtype=jnp.dtype(spec.dtype).name,
        axes=spec.axes,
        spec=tuple((p,) if isinstance(p, str) else tuple(p or ()) for p in placement.spec),
        rule=placement.rule,
        bytes_total=spec.nbytes,
        bytes_per_device=spec.nbytes // placement.num_shards,
        replicas=devices // placement.num_shards,
    )


@dataclass(frozen=True)
class TrainingFlops:
    """Training FLOPs a token (forward and backward), under both conventions for attention."""

    full: float
    """Causal attention counted as if nothing were masked (Chowdhery et al. 2022, appendix B)."""
    causal: float
    """Causal attention counted at half, as a kernel computes it."""


def count_active_parameters(flat: Mapping[str, ParamSpec], config: ModelConfig) -> float:
    """Parameters that one token meets: all but the routed experts it is not sent to."""
    share = config.expert_share
    return sum(s.size * (share if "expert" in s.axes else 1) for s in flat.values())


def count_training_flops(work: RunWorkload) -> TrainingFlops:
    """FLOPs a token of a training step, whatever an implementation spends; of an encoder and a
    decoder, a token of the decoder's.

    6 for every weight a token is multiplied with (2 forward, 4 backward): hidden matrices, of
    routed experts those a token meets, routers and the output head, tied or not, but not table
    look-ups, norms, biases and what an adapter adds. Attention's two products, and what layers
    state beside, take their forward FLOPs and twice as many backward.
    """
    weights = float(sum(kernel.size for kernel in (*work.outer_kernels, work.head)))
    full = causal = 0.0
    for stack in work.stacks:
        tokens = stack.depth * stack.rate
        for group in stack.matmuls:
            met = work.config.model.expert_share if group.has_experts else 1
            weights += group.size * stack.depth * group.rate * met
        if stack.router is not None:
            weights += stack.router.size * tokens
        other = sum(branch.costs.flops for branch in stack.branches) * tokens
        full, causal = full + other, causal + other
        for own, layers in stack.attention.items():
            width = own.heads.num_heads * (own.heads.head_dim + own.heads.value_dim)
            products = 2.0 * width * layers * own.rate * own.key_len
            full += products
            causal += products * (0.5 if own.causal else 1.0)
    return TrainingFlops(full=6.0 * weights + 3 * full, causal=6.0 * weights + 3 * causal)
