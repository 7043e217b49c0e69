"""A run's model laid out on a mesh, with every check that it can be; no device is needed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from maxlm.models.architectures import Model
from maxlm.models.params import Params, flatten_names, param_specs
from maxlm.parallel.context import check_context
from maxlm.run import (
    RunConfig,
    check_batch,
    check_crossing,
    check_experts,
    check_samples,
    check_stages,
)
from maxlm.sharding import (
    AxisRules,
    Placement,
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


def place_model(
    config: RunConfig, sizes: Mapping[str, int], dtype: Any, *, for_training: bool = True
) -> PlacedModel:
    """Lay a run's model out on a mesh of given sizes.

    Args:
        sizes: mesh axis → devices.
        dtype: of the maths.
        for_training: the batch must divide over the mesh. Otherwise the model is to generate: a
            row's tokens come one at a time through all layers, so that neither is split.

    Raises:
        MaxlmError: an axis that does not divide, two on one mesh axis, a batch that does not
            divide, too much unsharded.
    """
    sharding = config.sharding
    gradients = sharding.gradients or sharding.storage
    rules = (sharding.storage, gradients, sharding.optimizer or gradients, sharding.compute)
    rules = [own.for_mesh(sizes) for own in rules]
    if for_training:
        check_batch(config, sizes)
        check_stages(config, sizes)
        check_samples(config, [1] * len(config.samples.prompts))
    else:
        whole: dict[str, Any] = dict.fromkeys(("seq", "residual", "layers"), ())
        rules = [own.model_copy(update=whole) for own in rules]
    storage, gradients, optimizer, compute = rules
    check_activations(compute)
    check_experts(config, sizes)
    check_crossing(config, sizes)
    if for_training:
        attention, parallel = config.model.attention, config.parallel
        for window in dict.fromkeys(kind.window for kind in config.model.kinds):
            check_context(
                config.data.seq_len,
                attention.num_heads,
                attention.num_kv_heads,
                rules=compute,
                sizes=sizes,
                window=window,
                method=parallel.context,
                balanced=parallel.balance_sequence,
            )
    model = config.model.build(rules=compute, dtype=dtype, parallel=config.parallel)
    specs = param_specs(model)
    flat = flatten_names(specs)
    for name, spec in flat.items():
        for own in (gradients, optimizer, compute):
            resolve_placement(name, spec.shape, spec.axes, own, sizes)
    placements = {n: resolve_placement(n, s.shape, s.axes, storage, sizes) for n, s in flat.items()}
    parts = {name: (spec.nbytes, placements[name]) for name, spec in flat.items()}
    # Parameters that ZeRO-1 and ZeRO-2 keep whole are meant to be.
    if for_training and storage == optimizer:
        check_unsharded_share(parts, sizes, config.sharding.max_unsharded)
    return PlacedModel(model, storage, gradients, optimizer, compute, specs, placements)
