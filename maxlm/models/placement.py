"""A model laid out on a mesh, with every check that it can be; no device is needed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maxlm.config.requirements import Requirement, check_requirements
from maxlm.models.adapters import Adapter, build_adapted_model
from maxlm.models.architectures import Model, ModelConfig
from maxlm.models.checks import require_experts, require_pipeline, require_whole_sequences
from maxlm.models.params import Params, flatten_names, param_specs
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.context import require_context
from maxlm.sharding import (
    AxisRules,
    Placement,
    ShardingConfig,
    check_activations,
    check_unsharded_share,
    resolve_placement,
)


@dataclass(frozen=True)
class PlacedModel:
    """A model and where its parameters lie; nothing is allocated."""

    model: Model
    storage: AxisRules
    gradients: AxisRules
    optimizer: AxisRules
    compute: AxisRules
    """All without mesh axes of size 1."""
    specs: Params
    placements: dict[str, Placement]
    """Every parameter's place in storage, by its canonical name."""


@dataclass(frozen=True)
class TrainingShape:
    """The sizes of a batch that decide whether a model can be trained on a mesh."""

    seq_len: int
    """Tokens of a row of text."""
    micro_batches: Any


def require_trainable(
    model: ModelConfig,
    sharding: ShardingConfig,
    parallel: ParallelConfig,
    sizes: Mapping[str, Any],
    shape: TrainingShape,
    compute: AxisRules,
) -> Iterator[Requirement]:
    """A model can be trained on a mesh, but for how its parameters divide.

    Args:
        sizes: mesh axis → devices.
        compute: compute rules; those of ``sharding``, or without mesh axes of size 1.
    """
    yield from require_pipeline(model, sharding, parallel, sizes, shape.micro_batches)
    yield from require_experts(model, sharding.compute, sizes)
    yield from require_whole_sequences(model, sharding.compute, sizes)
    if model.attention is None:
        return
    for window in dict.fromkeys(kind.window for kind in model.kinds):
        yield from require_context(
            shape.seq_len,
            model.attention.num_heads,
            model.attention.num_kv_heads,
            rules=compute,
            sizes=sizes,
            window=window,
            method=parallel.context,
            balanced=parallel.balance_sequence,
        )


def place_model(
    config: ModelConfig,
    sharding: ShardingConfig,
    parallel: ParallelConfig,
    sizes: Mapping[str, int],
    dtype: Any,
    training: TrainingShape | None,
    adapter: Adapter | None = None,
) -> PlacedModel:
    """Lay a model out on a mesh of given sizes.

    Args:
        sizes: mesh axis → devices.
        dtype: of the maths.
        training: None where the model is to generate: a row's tokens come one at a time through
            all layers, so that neither is split.
        adapter: how its parameters rest; None: each as one array.

    Raises:
        MaxlmError: an axis that does not divide, two on one mesh axis, too much unsharded.
    """
    gradients = sharding.gradients or sharding.storage
    rules = (sharding.storage, gradients, sharding.optimizer or gradients, sharding.compute)
    rules = [own.for_mesh(sizes) for own in rules]
    if training is None:
        whole: dict[str, Any] = dict.fromkeys(("seq", "residual", "layers"), ())
        rules = [own.model_copy(update=whole) for own in rules]
    storage, gradients, optimizer, compute = rules
    check_activations(compute)
    if training is None:
        check_requirements(require_experts(config, sharding.compute, sizes))
        check_requirements(require_whole_sequences(config, sharding.compute, sizes))
    else:
        shape = (sizes, training, compute)
        check_requirements(require_trainable(config, sharding, parallel, *shape))
    how: dict[str, Any] = {"rules": compute, "dtype": dtype, "parallel": parallel}
    model = build_adapted_model(config, adapter, **how)
    specs = param_specs(model)
    flat = flatten_names(specs)
    for name, spec in flat.items():
        for own in (gradients, optimizer, compute):
            resolve_placement(name, spec.shape, spec.axes, own, sizes)
    placements = {n: resolve_placement(n, s.shape, s.axes, storage, sizes) for n, s in flat.items()}
    # Parameters that ZeRO-1 and ZeRO-2 keep whole are meant to be.
    if training is not None and storage == optimizer:
        parts = {name: (spec.nbytes, placements[name]) for name, spec in flat.items()}
        check_unsharded_share(parts, sizes, sharding.max_unsharded)
    return PlacedModel(model, storage, gradients, optimizer, compute, specs, placements)
