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
    """Resolve one array's partition. Raises MaxlmError: a dimension that its mesh axes
    do not divide; two dimensions on one mesh axis.

    Args:
        array_name: for errors.
        shape, axes: size and logical axis of each dimension.
        rules: on the mesh at hand, so without axes of size 1.
    """
    matched = []
    for size, axis in zip(shape, axes, strict=True):
        names = rules.mesh_axes(axis)
        if size % prod(mesh_sizes[name] for name in names):
            split = "·".join(f"{name}={mesh_sizes[name]}" for name in names)
            fix = f"change the mesh to a divisor of {size}, or set '{axis}' to null in "
            fix += "sharding.storage and sharding.compute to keep it whole"
            what = f"{axis}={size} does not divide over {split}"
            raise MaxlmError(what, where=array_name, fix=fix)
        if names:
            matched.append(f"{axis}→{'+'.join(names)}")
    used = _check_distinct(axes, rules, where=array_name)
    return Placement(
        spec=rules.spec(*axes),
        rule=", ".join(matched) or "whole",
        num_shards=prod(mesh_sizes[name] for name in used),
    )


def _check_distinct(
    axes: Sequence[str | None], rules: AxisRules, where: str
) -> dict[str, str]:
    """Refuse two logical axes of one array on one mesh axis; returns the mesh axes with
    their logical ones."""
    seen: dict[str, str] = {}
    for axis in filter(None, axes):
        for name in rules.mesh_axes(axis):
            if name in seen:
                what = f"axes {seen[name]} and {axis} are both on mesh axis '{name}'"
                fix = "give one of them another mesh axis, or null"
                raise MaxlmError(what, where=where, fix=fix)
            seen[name] = axis
    return seen


def check_activation_rules(rules: AxisRules) -> None:
    """Refuse compute rules that split two dimensions of one activation over the same
    mesh axis, or the width of the residual stream or of a head. ``rules``: on the mesh
    at hand, so without axes of size 1."""
    width = "the residual stream's width, which norms, experts and the loss need"
    head = "a head's width, which attention needs"
    for axis, needed in (("embed", width), ("expert_embed", width), ("head_dim", head)):
        if names := rules.mesh_axes(axis):
            what = f"mesh axis '{names[0]}' splits {needed} whole"
            fix = f"set it to null (sharding.storage.{axis} splits weights at rest)"
            raise MaxlmError(what, where=f"sharding.compute.{axis}", fix=fix)
    for axes in ACTIVATIONS:
        _check_distinct(axes, rules, where="sharding.compute")


def check_unsharded_share(
    placements: Mapping[str, tuple[int, Placement]],
    sizes: Mapping[str, int],
    max_share: float,
) -> None:
    """Refuse a plan that leaves too many parameter bytes whole on every device.
    ``placements``: path → (bytes, placement). ``max_share``: the largest share allowed;
    only meshes that split parameters are held to it."""
    if prod(sizes[axis] for axis in PARAMETER_AXES) == 1:
        return
    whole = {
        path: size
        for path, (size, placement) in placements.items()
        if placement.num_shards == 1
    }
    share = sum(whole.values()) / sum(size for size, _ in placements.values())
    if share > max_share:
        what = f"{share:.0%} of parameter bytes would be whole on every device "
        what += (
            f"(limit {max_share:.0%}), the largest {max(whole, key=whole.__getitem__)}"
        )
        fix = "give one of its axes a mesh axis, or raise sharding.max_unsharded"
        raise MaxlmError(what, where="sharding.storage", fix=fix)
