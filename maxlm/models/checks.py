"""Requirements of a model on the mesh that it is laid on."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from maxlm.config import MaxlmError
from maxlm.config.requirements import Requirement, is_divisor
from maxlm.models.architectures import ModelConfig
from maxlm.parallel.config import ParallelConfig
from maxlm.sharding import AxisRules, ShardingConfig


def check_latent_split(model: ModelConfig, compute: AxisRules) -> None:
    """
    Raises:
        MaxlmError: compute rules split the narrow vectors of latent attention.
    """
    latent = model.attention is not None and model.attention.latent is not None
    if latent and compute.latent:
        raise MaxlmError(
            "latent attention needs its narrow vectors whole",
            where="sharding.compute.latent",
            fix="set it to null (sharding.storage.latent splits weights at rest)",
        )


def require_pipeline(
    model: ModelConfig,
    sharding: ShardingConfig,
    parallel: ParallelConfig,
    sizes: Mapping[str, Any],
    micro_batches: Any,
) -> Iterator[Requirement]:
    """Micro-batches fill a pipeline, and layers divide over its stages.

    Args:
        sizes: mesh axis → devices.
    """
    stages, layers, groups = sizes["stage"], model.num_layers, parallel.layer_groups
    alone, period = np.equal(stages, 1), len(model.kinds)
    on_stages = sharding.compute.layers == sharding.storage.layers == ("stage",)
    yield Requirement(
        alone | on_stages,
        lambda: MaxlmError(
            f"mesh.stage={stages}, but layers are not split over it",
            where="sharding.storage.layers, sharding.compute.layers",
            fix="set both to stage, or mesh.stage=1",
        ),
    )

    def starved() -> MaxlmError:
        few = "less than" if micro_batches < stages else "not a multiple of"
        fewer = f"a divisor of {micro_batches}" if micro_batches > 1 else "1"
        return MaxlmError(
            f"{micro_batches} is {few} the {stages} pipeline stages",
            where="train.micro_batches",
            fix=f"set it to {-(-micro_batches // stages) * stages}, or mesh.stage to {fewer}",
        )

    yield Requirement(alone | is_divisor(stages, micro_batches), starved)
    yield Requirement(
        alone | (groups == 1 or parallel.schedule == "circular"),
        lambda: MaxlmError(
            f"{groups} layer groups have no place in a {parallel.schedule} pipeline",
            where="parallel.layer_groups",
            fix="set it to 1, or parallel.schedule=circular",
        ),
    )
    why = describe_pipeline_obstacle(model)
    yield Requirement(
        alone | (why is None),
        lambda: MaxlmError(
            f"{stages} stages have equal shares of one row of layers, but {why}",
            where="mesh.stage",
            fix="set it to 1 and give its devices to data, fsdp or tensor",
        ),
    )

    def uneven() -> MaxlmError:
        of = f" of {groups} layer groups" if groups > 1 else ""
        whole = f" in whole patterns of {period}" if period > 1 else ""
        return MaxlmError(
            f"{layers} layers do not divide over {stages} pipeline stages{of}{whole}",
            where="model.num_layers",
            fix=f"use a multiple of {stages * groups * period}, or fewer stages"
            + (" or layer groups" if groups > 1 else ""),
        )

    yield Requirement(alone | is_divisor(stages * groups * period, layers), uneven)


def describe_pipeline_obstacle(model: ModelConfig) -> str | None:
    """Return why a model's layers cannot lie on pipeline stages; None: they can, if their number
    divides."""
    if len(model.trunks) > 1:
        return "this is an encoder beside a decoder"
    if model.architecture == "encoder":
        return "this is an encoder, whose head's own layer is behind them"
    if model.dense_layers:
        return f"the first model.dense_layers={model.dense_layers} are unlike the others"
    if model.positions.kind == "relative":
        return "all of these share the table of model.positions.kind=relative"
    return None


def require_whole_sequences(
    model: ModelConfig, compute: AxisRules, sizes: Mapping[str, Any]
) -> Iterator[Requirement]:
    """A decoder's tokens have an encoder's whole output at hand, and experts with a capacity whole
    sequences."""
    whole = np.equal(prod(sizes[axis] for axis in compute.seq), 1)

    def name_split() -> tuple[str, Any]:
        return next((axis, sizes[axis]) for axis in compute.seq if sizes[axis] > 1)

    def crossing() -> MaxlmError:
        axis, size = name_split()
        return MaxlmError(
            f"cross-attention looks at whole sequences, which {axis}={size} splits",
            where=f"mesh.{axis}",
            fix="set it to 1, or sharding.compute.seq and residual to null",
        )

    def counted() -> MaxlmError:
        axis, size = name_split()
        return MaxlmError(
            f"an expert's capacity is counted in whole sequences, which {axis}={size} splits",
            where="model.moe.dispatch",
            fix="use dispatch=dropless, or mesh.context=1",
        )

    yield Requirement(whole | (not any(trunk.cross_attention for trunk in model.trunks)), crossing)
    by_capacity = model.moe is not None and model.moe.dispatch == "capacity"
    yield Requirement(whole | (not by_capacity), counted)


def require_experts(
    model: ModelConfig, compute: AxisRules, sizes: Mapping[str, Any]
) -> Iterator[Requirement]:
    """Experts, if there are any, are split as the tokens they serve."""
    if model.moe is None:
        yield Requirement(
            np.equal(sizes["expert"], 1),
            lambda: MaxlmError(
                f"expert={sizes['expert']}, but the model has no experts",
                where="mesh.expert",
                fix="set it to 1 and give its devices to data, fsdp or tensor",
            ),
        )
        return
    for axis in compute.expert:
        if axis not in compute.batch + compute.seq:
            yield Requirement(
                np.equal(sizes[axis], 1),
                lambda axis=axis: MaxlmError(
                    f"experts are split over '{axis}', the tokens they serve are not",
                    where="sharding.compute.expert",
                    fix=f"add {axis} to sharding.compute.batch, or take it from this rule",
                ),
            )
