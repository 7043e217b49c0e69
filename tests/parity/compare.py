"""The same weights in transformers and here."""

import json
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm.config import Config
from maxlm.huggingface.families import find_family
from maxlm.huggingface.families.family import ModelFamily
from maxlm.models.adapters import Adapter
from maxlm.models.architectures import ModelConfig
from maxlm.models.params import bind, flatten_names, join_path, param_specs
from maxlm.models.transforms import build_transformed_model
from maxlm.sharding import ShardingConfig
from tests.models.building import QUICK

TensorT = TypeVar("TensorT")


class Holder(Config):
    model: ModelConfig


def read(values: dict[str, Any], tensors: Any = ()) -> tuple[ModelFamily, Any]:
    """A config.json's family, and the model's config by way of a preset's text."""
    family = find_family(values, "config.json")
    settings, _ = family.read_config(values, "config.json", tensors)
    return family, Holder.model_validate({"model": settings}).model


def spell_as_published(
    family: ModelFamily, tensors: Mapping[str, TensorT], published: Collection[str]
) -> dict[str, TensorT]:
    """Tensors that transformers saved and the family reads, under the names of
    ``published`` where these differ."""

    def spell(name: str) -> str:
        for usual, other in family.suffix_aliases.items():
            if name not in published and name.endswith(other):
                return name.removesuffix(other) + usual
        return name

    def is_read(name: str) -> bool:
        return not any(fnmatch(name, pattern) for pattern in family.ignored_tensors)

    return {spell(name): tensor for name, tensor in tensors.items() if is_read(name)}


def parameters(
    config: Any, entries: Any, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Every parameter by canonical name, filled from tensors."""
    specs = flatten_names(
        param_specs(config.build(rules=ShardingConfig().compute, dtype=jnp.float32))
    )
    dtype = np.result_type(*(x.dtype for x in tensors.values()))
    arrays = {name: np.full(spec.shape, np.nan, dtype) for name, spec in specs.items()}
    for entry in entries:
        whole = tensors[entry.theirs]
        assert whole.shape == entry.shape, (entry.theirs, whole.shape, entry.shape)
        for place, part in zip(entry.ours, entry.split(whole), strict=True):
            arrays[place.name][place.index] = part
    for name, value in arrays.items():
        assert not np.isnan(value).any(), f"{name} is not filled"
    return arrays


def placed(flat: dict[str, Any], mesh: Mesh) -> Any:
    """Parameters, nested, on a mesh's every device."""
    return jax.device_put(
        unflatten_dict(flat, sep="."), NamedSharding(mesh, PartitionSpec())
    )


def one_device() -> Mesh:
    from maxlm.sharding import MeshConfig, make_mesh

    return make_mesh(MeshConfig(), jax.local_devices()[:1])


def logits(
    config: Any,
    flat: dict[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    segments: np.ndarray | None = None,
    dtype: Any = jnp.float32,
    adapter: Adapter | None = None,
    **more: np.ndarray | tuple[np.ndarray | None, ...],
) -> np.ndarray:
    """[B, S, V] of our model.

    Args:
        more: ``types`` of an encoder, ``inputs`` of an encoder beside a decoder.
    """
    mesh = one_device()
    rules = ShardingConfig().compute.for_mesh(dict(mesh.shape))
    model = build_transformed_model(
        config, [] if adapter is None else [adapter], rules=rules, dtype=dtype
    )
    if positions is None:
        positions = np.broadcast_to(
            np.arange(tokens.shape[1], dtype=np.int32), tokens.shape
        )
    whole = NamedSharding(mesh, PartitionSpec())

    @partial(jax.jit, compiler_options=QUICK)
    def run(params, tokens, positions, segments, more):
        bound = bind(model, params)
        hidden, _ = bound(tokens, positions, segments, **more)
        return bound.logits(hidden)

    with jax.set_mesh(mesh):
        specs = param_specs(model)
        named = jax.tree_util.tree_map_with_path(
            lambda path, _: flat[join_path(path)], specs
        )
        params = jax.device_put(named, whole)
        put = jax.tree.map(
            lambda a: jax.device_put(np.asarray(a, np.int32), whole),
            (tokens, positions, segments, more),
        )
        return np.asarray(run(params, *put))


def tensors_of(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A folder's config.json and tensors, by the safetensors library."""
    from safetensors.numpy import load_file

    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return json.loads((folder / "config.json").read_text()), tensors
