"""Layouts of arrays on devices: meshes, axis rules, partitions. No maths."""

from maxlm.sharding.mesh import (
    MESH_AXES,
    MeshConfig,
    bind_mesh,
    count_min_devices,
    jit_sharded,
    make_mesh,
    mesh_sizes,
    parse_mesh,
)
from maxlm.sharding.resolve import Placement, resolve_placement
from maxlm.sharding.rules import AxisRules, ShardingConfig

__all__ = [
    "MESH_AXES",
    "AxisRules",
    "MeshConfig",
    "Placement",
    "ShardingConfig",
    "bind_mesh",
    "count_min_devices",
    "jit_sharded",
    "make_mesh",
    "mesh_sizes",
    "parse_mesh",
    "resolve_placement",
]
