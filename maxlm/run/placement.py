"""A run's models on a mesh: every check that they fit, and where each array lies."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from flax import nnx
from jax.typing import DTypeLike

from maxlm.config import MaxlmError
from maxlm.config.errors import Count, Requirement, check_requirements
from maxlm.models.architectures import Model
from maxlm.models.params import AUXILIARY, param_specs
from maxlm.run.config import (
    RunConfig,
    check_samples,
    read_auxiliary_configs,
    read_frozen_configs,
)
from maxlm.run.global_batch import require_batch_split
from maxlm.run.model_placement import (
    PlacedModel,
    TrainingShape,
    place_model,
    require_trainable,
)


def require_run_trainable(
    config: RunConfig, sizes: Mapping[str, Count], micro_batches: Count
) -> Iterator[Requirement]:
    """Yields what a run must meet to train on one or many meshes, but for how its
    parameters divide. ``sizes``: devices, by mesh axis."""
    yield from _require_batch(config, sizes, micro_batches)
    shape = TrainingShape(config.data.seq_len, micro_batches)
    yield from require_trainable(
        config.model,
        config.sharding,
        config.parallel,
        sizes,
        shape,
        config.sharding.compute,
    )


def _require_batch(
    config: RunConfig, sizes: Mapping[str, Count], micro_batches: Count
) -> Iterator[Requirement]:
    """Yields what a run's batches must meet."""
    data = config.data
    compute = config.sharding.compute
    yield from config.task.require_mesh(compute, sizes)
    lengths = config.task.name_row_lengths(data.seq_len)
    yield from require_batch_split(
        data.batch_size, micro_batches, lengths, compute, sizes
    )


def place_run(
    config: RunConfig,
    sizes: Mapping[str, int],
    dtype: DTypeLike,
    *,
    for_training: bool = True,
) -> PlacedModel:
    """Lays a run's model out on a mesh (``place_model``): to generate, or
    ``for_training``, with the task's auxiliary models, where the batch must divide over
    the mesh."""
    placed = _place_own_model(config, sizes, dtype, for_training=for_training)
    auxiliary = read_auxiliary_configs(config) if for_training else {}
    if not auxiliary:
        return placed
    if sizes["stage"] > 1:
        message = f"task.kind={config.task.kind} trains a model beside the run's own, "
        message += "which a pipeline cannot run"
        raise MaxlmError(message, where="mesh.stage", fix="set it to 1")
    modules: dict[str, Model] = {}
    placements = dict(placed.placements)
    for name, model in auxiliary.items():
        run = config.model_copy(
            update={"model": model, "adapter": None, "quantization": None}
        )
        other = _place_own_model(run, sizes, dtype, for_training=True)
        modules[name] = other.model
        for parameter, placement in other.placements.items():
            placements[f"{AUXILIARY}.{name}.{parameter}"] = placement
    placed.model.auxiliary = nnx.Dict(modules)
    specs = param_specs(placed.model)
    return replace(placed, specs=specs, placements=placements)


def _place_own_model(
    config: RunConfig,
    sizes: Mapping[str, int],
    dtype: DTypeLike,
    *,
    for_training: bool,
) -> PlacedModel:
    """Lays out one model."""
    shape = None
    if for_training:
        micro_batches = config.train.micro_batches
        check_requirements(_require_batch(config, sizes, micro_batches))
        # Without a tokenizer a prompt's length is not known: one token at least.
        prompt_lengths = [1] * len(config.samples.prompts)
        check_samples(config.samples, config.model, prompt_lengths)
        shape = TrainingShape(config.data.seq_len, micro_batches)
    return place_model(
        config.model,
        config.sharding,
        config.parallel,
        sizes,
        dtype,
        shape,
        config.transforms,
    )


def place_frozen_models(
    config: RunConfig,
    sources: Mapping[str, str | None],
    sizes: Mapping[str, int],
    dtype: DTypeLike,
) -> dict[str, PlacedModel]:
    """Lays out the models that a run's task only reads, by name."""
    is_1f1b = sizes["stage"] > 1 and config.parallel.schedule == "1f1b"
    if is_1f1b and sources and not config.task.prepares_batch_alone:
        message = (
            f"task.kind={config.task.kind} reads other models, which a 1f1b pipeline "
            "cannot run"
        )
        fix = "use circular, or mesh.stage=1"
        raise MaxlmError(message, where="parallel.schedule", fix=fix)
    placed = {}
    for name, frozen_run in read_frozen_configs(config, sources).items():
        run = config.model_copy(
            update={
                "model": frozen_run.model,
                "adapter": frozen_run.adapter,
                "quantization": frozen_run.quantization,
            }
        )
        placed[name] = _place_own_model(run, sizes, dtype, for_training=True)
    return placed
