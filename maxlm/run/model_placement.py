"""A model laid out on a mesh, with every check that it can be; no device is needed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import jax
import numpy as np
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.config.errors import Count, Requirement, check_requirements
from maxlm.models.architectures import Model, ModelConfig
from maxlm.models.blocks import BLOCKS, MIXERS, get_kind, list_mixer_parts
from maxlm.models.params import (
    Params,
    ParamSpec,
    bind_specs,
    flatten_names,
    param_specs,
)
from maxlm.models.transforms import ParamTransform, build_transformed_model
from maxlm.parallel.config import ParallelConfig
from maxlm.parallel.context import (
    require_context,
    require_keys_beside_queries,
    require_split_length,
)
from maxlm.sharding import AxisRules, Placement, ShardingConfig, resolve_placement
from maxlm.sharding.resolve import check_activation_rules, check_unsharded_share
from maxlm.sharding.supported import require_declared_axes

_GIVE_DEVICES_FIX = "set it to 1 and give its devices to data, fsdp or tensor"


@dataclass(frozen=True)
class PlacedModel:
    """A model and where its parameters lie; nothing is allocated."""

    model: Model
    storage: AxisRules
    gradients: AxisRules
    optimizer: AxisRules
    compute: AxisRules
    """Rules, all without mesh axes of size 1."""
    specs: Params
    placements: dict[str, Placement]
    """Every parameter's place in storage, by its canonical name."""


@dataclass(frozen=True)
class TrainingShape:
    """The sizes of a batch that decide whether a model can be trained on a mesh."""

    seq_len: int
    """Tokens of a row of text."""
    micro_batches: Count
    """Parts of a batch that run one after the other."""


def require_trainable(
    model: ModelConfig,
    sharding: ShardingConfig,
    parallel: ParallelConfig,
    sizes: Mapping[str, Count],
    shape: TrainingShape,
    compute: AxisRules,
) -> Iterator[Requirement]:
    """Yields what a model must meet to be trained on a mesh, but for how parameters
    divide. ``sizes``: devices, by mesh axis."""
    yield from require_pipeline(model, sharding, parallel, sizes, shape.micro_batches)
    yield from require_experts(model, sharding.compute, sizes)
    yield from require_whole_sequences(model, sharding.compute, sizes)
    mixers = [part for mixer in model.list_mixers() for part in list_mixer_parts(mixer)]
    for mixer in dict.fromkeys(mixers):
        kind = get_kind(mixer)
        yield from require_declared_axes(
            MIXERS.get(kind).mesh_axes,
            compute,
            sizes,
            subject=f"model.mixer.kind={kind}",
            how_to_declare="register it in MIXERS with '{}' among mesh_axes",
        )
    if model.block is not None:
        kind = get_kind(model.block)
        yield from require_declared_axes(
            BLOCKS.get(kind).mesh_axes,
            compute,
            sizes,
            subject=f"model.block.kind={kind}",
            how_to_declare="register it in BLOCKS with '{}' among mesh_axes",
        )
    yield from require_split_length(
        shape.seq_len, rules=compute, sizes=sizes, balanced=parallel.balance_sequence
    )
    for attention in model.list_attention():
        yield from require_context(
            shape.seq_len,
            attention.num_heads,
            attention.num_kv_heads,
            rules=compute,
            sizes=sizes,
            method=parallel.context,
            balanced=parallel.balance_sequence,
        )


def place_model(
    config: ModelConfig,
    sharding: ShardingConfig,
    parallel: ParallelConfig,
    sizes: Mapping[str, int],
    dtype: DTypeLike,
    training: TrainingShape | None,
    transforms: Sequence[ParamTransform] = (),
) -> PlacedModel:
    """Lays a model out on a mesh of given sizes, by axis. Raises MaxlmError: an axis
    that does not divide, two on one mesh axis, too much unsharded.

    Args:
        training: None where the model is to generate: a row's tokens come one at a time
            through all layers, so that neither is split; kv heads that do not divide
            are whole, while pages have copies of them and are split.
        transforms: how parameters are stored.
    """
    gradient_rules = sharding.gradients or sharding.storage
    optimizer_rules = sharding.optimizer or gradient_rules
    all_rules = [
        sharding.storage.for_mesh(sizes),
        gradient_rules.for_mesh(sizes),
        optimizer_rules.for_mesh(sizes),
        sharding.compute.for_mesh(sizes),
    ]
    if training is None:
        all_rules = [
            _adapt_rules_to_generation(rules, config, sharding.compute, sizes)
            for rules in all_rules
        ]
    storage, gradients, optimizer, compute = all_rules

    check_activation_rules(compute)
    if training is None:
        check_requirements(require_experts(config, sharding.compute, sizes))
        check_requirements(require_whole_sequences(config, sharding.compute, sizes))
        for attention in config.list_attention():
            requirements = require_keys_beside_queries(
                attention.num_heads, attention.num_kv_heads, compute, sizes
            )
            check_requirements(requirements)
    else:
        requirements = require_trainable(
            config, sharding, parallel, sizes, training, compute
        )
        check_requirements(requirements)

    model = build_transformed_model(
        config, transforms, rules=compute, dtype=dtype, parallel=parallel
    )
    specs = _keep_small_planes_whole(param_specs(model), all_rules, sizes)
    model = bind_specs(model, specs)
    flat_specs = flatten_names(specs)
    # Refuses axes that do not divide, by whichever rules.
    for name, spec in flat_specs.items():
        for rules in (gradients, optimizer, compute):
            resolve_placement(name, spec.shape, spec.axes, rules, sizes)
    placements = {
        name: resolve_placement(name, spec.shape, spec.axes, storage, sizes)
        for name, spec in flat_specs.items()
    }
    # Parameters that ZeRO-1 and ZeRO-2 keep whole are meant to be.
    if training is not None and storage == optimizer:
        parts = {
            name: (spec.nbytes, placements[name]) for name, spec in flat_specs.items()
        }
        check_unsharded_share(parts, sizes, sharding.max_unsharded)
    return PlacedModel(model, storage, gradients, optimizer, compute, specs, placements)


def _adapt_rules_to_generation(
    rules: AxisRules,
    config: ModelConfig,
    compute: AxisRules,
    sizes: Mapping[str, int],
) -> AxisRules:
    """Returns rules that split neither sequences nor layers, nor kv heads that do not
    divide over the devices of query heads (by the rules ``compute``)."""
    whole_axes = ["seq", "residual", "layers"]
    head_shards = prod(sizes[axis] for axis in compute.heads)
    divides = [
        attention.num_kv_heads % head_shards == 0
        for attention in config.list_attention()
    ]
    if not all(divides):
        whole_axes.append("kv_heads")
    return rules.model_copy(update=dict.fromkeys(whole_axes, ()))


def _keep_small_planes_whole(
    specs: Params, all_rules: Sequence[AxisRules], sizes: Mapping[str, int]
) -> Params:
    """Returns declarations in which the scales of quantized matrices are whole along
    the embed axis, where they are too few to divide over the devices that store it.
    Compute rules never split it, so that products have all scales of their codes."""

    def keep_whole(spec: ParamSpec) -> ParamSpec:
        if spec.role != "packed" or "embed" not in spec.axes:
            return spec
        dim = spec.axes.index("embed")
        splits = [
            prod(sizes[axis] for axis in rules.mesh_axes("embed"))
            for rules in all_rules
        ]
        if all(spec.shape[dim] % split == 0 for split in splits):
            return spec
        axes = list(spec.axes)
        axes[dim] = None
        return replace(spec, axes=tuple(axes))

    return jax.tree.map(keep_whole, specs)


def check_latent_split(model: ModelConfig, compute: AxisRules) -> None:
    """Refuses compute rules that split the narrow vectors of latent attention."""
    has_latent = any(attention.latent for attention in model.list_attention())
    if has_latent and compute.latent:
        message = "latent attention needs its narrow vectors whole"
        fix = "set it to null (sharding.storage.latent splits stored weights)"
        raise MaxlmError(message, where="sharding.compute.latent", fix=fix)


def require_pipeline(
    model: ModelConfig,
    sharding: ShardingConfig,
    parallel: ParallelConfig,
    sizes: Mapping[str, Count],
    micro_batches: Count,
) -> Iterator[Requirement]:
    """Requires that micro-batches fill a pipeline, and layers divide over its
    stages."""
    stages = sizes["stage"]
    layers = model.num_layers
    groups = parallel.layer_groups
    has_one_stage = np.equal(stages, 1)

    on_stages = sharding.compute.layers == sharding.storage.layers == ("stage",)
    message = f"mesh.stage={stages}, but layers are not split over it"
    where = "sharding.storage.layers, sharding.compute.layers"
    fix = "set both to stage, or mesh.stage=1"
    make_error = partial(MaxlmError, message, where=where, fix=fix)
    yield Requirement(has_one_stage | on_stages, make_error)

    def make_micro_batches_error() -> MaxlmError:
        relation = "less than" if micro_batches < stages else "not a multiple of"
        fewer_stages = f"a divisor of {micro_batches}" if micro_batches > 1 else "1"
        next_multiple = -(-micro_batches // stages) * stages
        message = f"{micro_batches} is {relation} the {stages} pipeline stages"
        fix = f"set it to {next_multiple}, or mesh.stage to {fewer_stages}"
        return MaxlmError(message, where="train.micro_batches", fix=fix)

    fills_stages = micro_batches % stages == 0
    yield Requirement(has_one_stage | fills_stages, make_micro_batches_error)

    may_have_groups = groups == 1 or parallel.schedule == "circular"
    message = f"{groups} layer groups have no place in a {parallel.schedule} pipeline"
    fix = "set it to 1, or parallel.schedule=circular"
    make_error = partial(MaxlmError, message, where="parallel.layer_groups", fix=fix)
    yield Requirement(has_one_stage | may_have_groups, make_error)

    obstacle = describe_pipeline_obstacle(model)
    message = f"{stages} stages have equal shares of one row of layers, but {obstacle}"
    make_error = partial(MaxlmError, message, where="mesh.stage", fix=_GIVE_DEVICES_FIX)
    yield Requirement(has_one_stage | (obstacle is None), make_error)

    # Stages, and the groups of layers of each, have whole repeats of the layers' kinds.
    main_run = next(run for run in model.layer_runs if run.name == "layers")
    period = len(main_run.kinds)
    layers_divisor = stages * groups * period

    def make_layers_error() -> MaxlmError:
        of_groups = f" of {groups} layer groups" if groups > 1 else ""
        in_periods = f" in whole patterns of {period}" if period > 1 else ""
        message = (
            f"{layers} layers do not divide over {stages} pipeline stages"
            f"{of_groups}{in_periods}"
        )
        fix = f"use a multiple of {layers_divisor}, or fewer stages"
        if groups > 1:
            fix += " or layer groups"
        return MaxlmError(message, where="model.num_layers", fix=fix)

    divides = layers % layers_divisor == 0
    yield Requirement(has_one_stage | divides, make_layers_error)


def describe_pipeline_obstacle(model: ModelConfig) -> str | None:
    """Returns why layers cannot lie on pipeline stages; None: they can, if their number
    divides."""
    if len(model.trunks) > 1:
        return "this is an encoder beside a decoder"
    if model.transformer_type == "encoder":
        return "this is an encoder, whose head's own layer is behind them"
    if model.dense_layers:
        return (
            f"the first model.dense_layers={model.dense_layers} are unlike the others"
        )
    if model.mtp is not None:
        return "modules of model.mtp stand behind them"
    if model.layer_inputs is not None:
        return "each reads its part of model.layer_inputs"
    if model.shared_blocks:
        return "some read weights of a block that others read too (mixer.block)"
    if model.shared_kinds:
        return "some read keys of others (model.kinds.*.keys_of)"
    if model.layer_runs[0].name != "layers":
        return "model.pattern does not repeat from the first layer on"
    main_run = model.layer_runs[0]
    # A pattern that is cut is told by how many layers it is too long.
    if len(model.layer_runs) > 1 and len(main_run.kinds) != len(model.pattern):
        return "model.pattern does not repeat up to the last layer"
    if model.positions.kind == "relative":
        return "all of these share the table of model.positions.kind=relative"
    return None


def require_whole_sequences(
    model: ModelConfig, compute: AxisRules, sizes: Mapping[str, Count]
) -> Iterator[Requirement]:
    """Requires whole sequences for cross-attention, and for experts with a capacity."""
    is_whole = np.equal(prod(sizes[axis] for axis in compute.seq), 1)

    def make_split_error(needs: str, where: str, fix: str) -> MaxlmError:
        """`needs`: what needs whole sequences, and its verb; `where`: with "{axis}" for
        the mesh axis that splits them."""
        axis = next(axis for axis in compute.seq if sizes[axis] > 1)
        message = f"{needs} whole sequences, which {axis}={sizes[axis]} splits"
        return MaxlmError(message, where=where.format(axis=axis), fix=fix)

    crosses = any(trunk.cross_attention for trunk in model.trunks)
    make_error = partial(
        make_split_error,
        "cross-attention looks at",
        where="mesh.{axis}",
        fix="set it to 1, or sharding.compute.seq and residual to null",
    )
    yield Requirement(is_whole | (not crosses), make_error)

    has_capacity = model.moe is not None and model.moe.dispatch == "capacity"
    make_error = partial(
        make_split_error,
        "an expert's capacity is counted in",
        where="model.moe.dispatch",
        fix="use dispatch=dropless, or mesh.context=1",
    )
    yield Requirement(is_whole | (not has_capacity), make_error)


def require_experts(
    model: ModelConfig, compute: AxisRules, sizes: Mapping[str, Count]
) -> Iterator[Requirement]:
    """Requires that experts, if there are any, are split as the tokens they serve."""
    if model.moe is None:
        message = f"expert={sizes['expert']}, but the model has no experts"
        make_error = partial(
            MaxlmError, message, where="mesh.expert", fix=_GIVE_DEVICES_FIX
        )
        yield Requirement(np.equal(sizes["expert"], 1), make_error)
        return
    token_axes = compute.batch + compute.seq
    for axis in compute.expert:
        if axis in token_axes:
            continue
        message = f"experts are split over '{axis}', the tokens they serve are not"
        fix = f"add {axis} to sharding.compute.batch, or take it from this rule"
        make_error = partial(
            MaxlmError, message, where="sharding.compute.expert", fix=fix
        )
        yield Requirement(np.equal(sizes[axis], 1), make_error)
