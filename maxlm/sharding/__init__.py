"""How arrays lie on devices: meshes, axis rules, partitions. No maths."""

from maxlm.sharding.create import jit_in_place, on_mesh
from maxlm.sharding.links import links
from maxlm.sharding.mesh import (
    MESH_AXES,
    MeshConfig,
    abstract_mesh,
    make_mesh,
    mesh_sizes,
    parse_mesh,
    smallest,
)
from maxlm.sharding.resolve import Placement, check_activations, check_unsharded, place
from maxlm.sharding.rules import LOGICAL_AXES, AxisRules, ShardingConfig

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "AxisRules",
    "MeshConfig",
    "Placement",
    "ShardingConfig",
    "abstract_mesh",
    "check_activations",
    "check_unsharded",
    "jit_in_place",
    "links",
    "make_mesh",
    "mesh_sizes",
    "on_mesh",
    "parse_mesh",
    "place",
    "smallest",
]
