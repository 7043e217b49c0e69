"""How a run's arrays lie on a mesh, parameter by parameter; no device is needed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.params import ParamSpec, flatten_names
from maxlm.plan.fit import place_run
from maxlm.plan.flops import count_active_parameters, count_training_flops
from maxlm.plan.notes import list_layout_notes
from maxlm.plan.workload import TokensPerRow
from maxlm.run import RunConfig
from maxlm.sharding import Placement, abstract_mesh
from maxlm.train.optimizer import abstract_opt_state, make_optimizer
from maxlm.train.schedule import make_schedule
from maxlm.train.state import param_shardings
from maxlm.train.trainable import select_trainable


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
    """Training, of a token of text, causal attention counted at half; see plan/flops.py."""
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
        links: what each mesh axis runs over (``describe_links``), where devices are at hand.

    Raises:
        MaxlmError: an axis that does not divide, two on one mesh axis, a batch that does not
            divide, too much unsharded.
    """
    placed = place_run(config, sizes, jnp.float32)
    tree, specs = placed.specs, flatten_names(placed.specs)
    devices = prod(sizes.values())
    rows = tuple(_row(name, specs[name], placed.placements[name], devices) for name in specs)
    schedule = make_schedule(config.schedule, config.train.steps)
    trained = select_trainable(tree, config.train.trainable)
    names = [name for name, spec in flatten_names(trained).items() if spec is not None]
    optimizer = make_optimizer(config.optimizer, schedule, trained)
    mesh = abstract_mesh(sizes)
    state = abstract_opt_state(optimizer, tree, param_shardings(tree, placed.optimizer, mesh))
    gradients = flatten_names(param_shardings(tree, placed.gradients, mesh))
    parameter_bytes = sum(row.bytes_per_device for row in rows)
    lengths = TokensPerRow.of(config)
    flops = count_training_flops(placed.model, *lengths)
    a_token = lengths.own / config.data.seq_len
    tokens = config.data.batch_size * config.data.seq_len
    return RunLayout(
        name=config.name,
        mesh=dict(sizes),
        devices=devices,
        parameters=sum(spec.size for spec in specs.values()),
        active_parameters=round(count_active_parameters(specs, config.model)),
        rows=rows,
        parameter_bytes=parameter_bytes,
        gradient_bytes=sum(
            prod(gradients[name].shard_shape(specs[name].shape))
            * jnp.dtype(specs[name].dtype).itemsize
            for name in names
        ),
        optimizer_bytes=sum(_bytes_per_device(leaf) for leaf in jax.tree.leaves(state)),
        average_bytes=parameter_bytes if config.train.ema_decay is not None else 0,
        tokens_per_step=tokens,
        tokens_total=tokens * config.train.steps,
        flops_per_token=flops.causal * a_token,
        flops_per_token_full_attention=flops.full * a_token,
        notes=list_layout_notes(config, placed, sizes, links),
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


def _bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
