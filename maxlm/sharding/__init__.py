"""Layouts of arrays on devices: meshes, axis rules, partitions. No maths."""

from maxlm.sharding.mesh import (
    MESH_AXES,
    MeshConfig,
    abstract_mesh,
    bind_mesh,
    count_min_devices,
    jit_sharded,
    make_mesh,
    mesh_sizes,
    parse_mesh,
)
from maxlm.sharding.resolve import (
    Placement,
    check_activation_rules,
    check_unsharded_share,
    resolve_placement,
)
from maxlm.sharding.rules import LOGICAL_AXES, AxisRules, ShardingConfig

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "AxisRules",
    "MeshConfig",
    "Placement",
    "ShardingConfig",
    "abstract_mesh",
    "bind_mesh",
    "check_activation_rules",
    "check_unsharded_share",
    "count_min_devices",
    "jit_sharded",
    "make_mesh",
    "mesh_sizes",
    "parse_mesh",
    "resolve_placement",
]
