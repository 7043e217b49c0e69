"""Resolves logical axes to partitions, with loud errors: nothing is dropped
silently."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from jax.sharding import PartitionSpec

from maxlm.config import MaxlmError
from maxlm.sharding.mesh import PARAMETER_AXES
from maxlm.sharding.rules import AxisRules

# Logical axes that occur together in what a model computes.
ACTIVATIONS = (
    ("batch", "residual", "embed"),
    ("batch", "seq", "heads", "head_dim"),
    ("batch", "seq", "kv_heads", "head_dim"),
    ("batch", "seq", "mlp"),
    ("batch", "seq", "vocab"),
)

_RESIDUAL_WIDTH = "the residual stream's width, which norms, experts and the loss need"
# Logical axes that compute rules may not split, and what they are.
WHOLE_AXES = {
    "embed": _RESIDUAL_WIDTH,
    "expert_embed": _RESIDUAL_WIDTH,
    "head_dim": "a head's width, which attention needs",
}


@dataclass(frozen=True)
class Placement:
    """Layout of one array on a mesh."""

    spec: PartitionSpec
    rule: str
    """The rules that matched, e.g. ``embed→fsdp, mlp→tensor``."""
    num_shards: int
    """Distinct pieces of the array; devices / shards is its replication."""


def resolve_placement(
    array_name: str,
    shape: Sequence[int],
    axes: Sequence[str | None],
    rules: AxisRules,
    mesh_sizes: Mapping[str, int],
) -> Placement:
    """Resolves one array's partition. Raises MaxlmError: a dimension that its mesh axes
    do not divide; two dimensions on one mesh axis.

    Args:
        array_name: for errors.
        shape, axes: size and logical axis of each dimension.
        rules: on the mesh at hand, so without axes of size 1.
    """
    matched = []
    for size, axis in zip(shape, axes, strict=True):
        mesh_axes = rules.mesh_axes(axis)
        if size % prod(mesh_sizes[name] for name in mesh_axes):
            split = "·".join(f"{name}={mesh_sizes[name]}" for name in mesh_axes)
            raise MaxlmError(
                f"{axis}={size} does not divide over {split}",
                where=array_name,
                fix=f"change the mesh to a divisor of {size}, or set '{axis}' to null "
                "in sharding.storage and sharding.compute to keep it whole",
            )
        if mesh_axes:
            matched.append(f"{axis}→{'+'.join(mesh_axes)}")
    used_axes = _check_distinct(axes, rules, where=array_name)
    return Placement(
        spec=rules.spec(*axes),
        rule=", ".join(matched) or "whole",
        num_shards=prod(mesh_sizes[name] for name in used_axes),
    )


def _check_distinct(
    axes: Sequence[str | None], rules: AxisRules, where: str
) -> dict[str, str]:
    """Refuses two logical axes of one array on one mesh axis; returns the mesh axes
    with their logical ones."""
    logical_axes: dict[str, str] = {}
    for axis in axes:
        for mesh_axis in rules.mesh_axes(axis):
            if mesh_axis in logical_axes:
                raise MaxlmError(
                    f"axes {logical_axes[mesh_axis]} and {axis} are both on mesh axis "
                    f"'{mesh_axis}'",
                    where=where,
                    fix="give one of them another mesh axis, or null",
                )
            assert axis is not None  # it has mesh axes
            logical_axes[mesh_axis] = axis
    return logical_axes


def check_activation_rules(rules: AxisRules) -> None:
    """Refuses compute rules that split two dimensions of one activation over the same
    mesh axis, or the width of the residual stream or of a head. ``rules``: on the mesh
    at hand, so without axes of size 1."""
    for axis, needed in WHOLE_AXES.items():
        mesh_axes = rules.mesh_axes(axis)
        if mesh_axes:
            raise MaxlmError(
                f"mesh axis '{mesh_axes[0]}' splits {needed} whole",
                where=f"sharding.compute.{axis}",
                fix=f"set it to null (sharding.storage.{axis} splits stored weights)",
            )
    for axes in ACTIVATIONS:
        _check_distinct(axes, rules, where="sharding.compute")


def check_unsharded_share(
    placements: Mapping[str, tuple[int, Placement]],
    sizes: Mapping[str, int],
    max_share: float,
) -> None:
    """Refuses a plan that leaves too many parameter bytes whole on every device.
    ``placements``: path → (bytes, placement). ``max_share``: the largest share allowed;
    only meshes that split parameters are held to it."""
    if prod(sizes[axis] for axis in PARAMETER_AXES) == 1:
        return
    whole_bytes = {
        path: num_bytes
        for path, (num_bytes, placement) in placements.items()
        if placement.num_shards == 1
    }
    total_bytes = sum(num_bytes for num_bytes, _ in placements.values())
    share = sum(whole_bytes.values()) / total_bytes
    if share > max_share:
        largest = max(whole_bytes, key=whole_bytes.__getitem__)
        raise MaxlmError(
            f"{share:.0%} of parameter bytes would be whole on every device "
            f"(limit {max_share:.0%}), the largest {largest}",
            where="sharding.storage",
            fix="give one of its axes a mesh axis, or raise sharding.max_unsharded",
        )
