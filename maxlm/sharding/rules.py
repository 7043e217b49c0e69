"""Axis rules: which mesh axes each logical axis is split over.

*Storage* rules say how parameters are stored between steps, and two further sets, where
they differ, how gradients and the optimizer's state are; *compute* rules say how
parameters and activations lie while they are used. Their difference is the parallelism,
here by what ``embed`` is split over:

==========================  =========  =========  =========  =======
kind                        storage    gradients  optimizer  compute
==========================  =========  =========  =========  =======
data parallel               null       null       null       null
ZeRO-1                      null       null       fsdp       null
ZeRO-2                      null       fsdp       fsdp       null
ZeRO-3, FSDP (the default)  fsdp       fsdp       fsdp       null
==========================  =========  =========  =========  =======

(Rajbhandari et al. 2020, §5.) With replicas over `data` as well, ZeRO-3 is HSDP.
``heads: tensor`` in storage and compute is tensor parallelism.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from jax.sharding import PartitionSpec
from pydantic import BeforeValidator, Field

from maxlm.config import Config
from maxlm.sharding.mesh import MeshAxis


def _as_tuple(value: object) -> object:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


MeshAxes = Annotated[tuple[MeshAxis, ...], BeforeValidator(_as_tuple)]


class AxisRules(Config):
    """One field per logical axis; each names the mesh axes it is split over (null:
    none)."""

    batch: MeshAxes = ()
    seq: MeshAxes = ()
    """The sequence within attention and MLP."""
    residual: MeshAxes = ()
    """The sequence of the residual stream and its norms: beyond `seq`'s axes it may
    have those that split heads and FFN (Megatron's sequence parallelism)."""
    embed: MeshAxes = ()
    """d_model: rows of weights in storage, the residual stream in compute."""
    heads: MeshAxes = ()
    kv_heads: MeshAxes = ()
    head_dim: MeshAxes = ()
    mlp: MeshAxes = ()
    vocab: MeshAxes = ()
    expert: MeshAxes = ()
    expert_embed: MeshAxes = ()
    """d_model of routed experts' weights, whose experts may take one of embed's mesh
    axes."""
    latent: MeshAxes = ()
    """The narrow vectors of latent attention, where they are written."""
    layers: MeshAxes = ()
    state: MeshAxes = ()
    """Recurrent state of state-space layers."""

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Returns the partition of an array whose dimensions carry these logical
        axes."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))

    def for_mesh(self, sizes: Mapping[str, int]) -> "AxisRules":
        """Returns these rules for a mesh's sizes: axes of size 1 split nothing and are
        left out."""
        rules: dict[str, Any] = {
            axis: tuple(name for name in self.mesh_axes(axis) if sizes[name] > 1)
            for axis in LOGICAL_AXES
        }
        return AxisRules(**rules)

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Returns the mesh axes of one logical axis (none for ``None``)."""
        return () if axis is None else getattr(self, axis)


LOGICAL_AXES = tuple(AxisRules.model_fields)


class StorageRules(AxisRules):
    """Layout of stored parameters and what belongs to them: by default ZeRO-3 over
    `fsdp`."""

    embed: MeshAxes = ("fsdp", "expert")
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("tensor",)
    expert: MeshAxes = ("expert",)
    expert_embed: MeshAxes = ("fsdp",)
    layers: MeshAxes = ("stage",)


class ComputeRules(AxisRules):
    """Layout of arrays in use: batch over all data-like axes, weights whole but for
    `tensor`."""

    batch: MeshAxes = ("data", "fsdp", "expert")
    seq: MeshAxes = ("context",)
    residual: MeshAxes = ("context",)
    heads: MeshAxes = ("tensor",)
    kv_heads: MeshAxes = ("tensor",)
    mlp: MeshAxes = ("tensor",)
    vocab: MeshAxes = ("tensor",)
    expert: MeshAxes = ("expert",)
    layers: MeshAxes = ("stage",)


class ShardingConfig(Config):
    """Layouts of arrays on the mesh."""

    storage: StorageRules = StorageRules()
    """Layout of parameters between steps."""
    gradients: StorageRules | None = None
    """Layout of gradients between micro-batches; null: as parameters in storage."""
    optimizer: StorageRules | None = None
    """Layout of the optimizer's state; null: as gradients."""
    compute: ComputeRules = ComputeRules()
    """Layout of parameters and activations while a step uses them."""
    max_unsharded: float = Field(default=0.1, ge=0, le=1)
    """Largest share of parameter bytes that may be whole on every device of a mesh that
    shards parameters at all; a plan above it is refused."""
