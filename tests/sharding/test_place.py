"""From logical axes to partitions: exact shard counts, loud errors, nothing dropped
silently."""

from collections import Counter
from math import prod

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.sharding import (
    MESH_AXES,
    AxisRules,
    MeshConfig,
    Placement,
    ShardingConfig,
    make_mesh,
    resolve_placement,
)
from maxlm.sharding.resolve import check_activation_rules, check_unsharded_share
from maxlm.sharding.rules import LOGICAL_AXES
from tests.errors import message

ONES = dict.fromkeys(MESH_AXES, 1)
STORAGE = ShardingConfig().storage


@given(st.data())
def test_shards_times_bytes_per_device_is_the_whole(data):
    """On real meshes of eight devices: JAX splits an array into just as many distinct
    pieces."""
    axes = data.draw(st.permutations(["data", "fsdp", "tensor", "expert", "context"]))[
        :3
    ]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **dict.fromkeys(axes, 2)}))
    sizes = dict(mesh.shape)
    logical = data.draw(
        st.lists(st.sampled_from(LOGICAL_AXES), min_size=1, max_size=3, unique=True)
    )
    free = list(MESH_AXES)
    rules = {}
    for axis in logical:
        names = data.draw(
            st.lists(st.sampled_from(free), max_size=2, unique=True), axis
        )
        free = [name for name in free if name not in names]
        rules[axis] = tuple(names)
    ways = [prod(sizes[n] for n in rules[axis]) for axis in logical]
    shape = tuple(w * data.draw(st.integers(1, 3)) for w in ways)
    placement = resolve_placement("w", shape, logical, AxisRules(**rules), sizes)

    array = jax.device_put(
        np.zeros(shape, np.float32), NamedSharding(mesh, placement.spec)
    )
    num_bytes = array.addressable_shards[0].data.nbytes
    assert placement.num_shards * num_bytes == array.nbytes
    assert placement.num_shards == len({str(s.index) for s in array.addressable_shards})
    used = Counter(n for axis in logical for n in rules[axis])
    assert placement.num_shards == prod(sizes[n] for n in used)


def test_too_many_whole_bytes_are_refused():
    """100 bytes of `norm` and 300 of `table` are whole, of 1,200."""
    num_bytes = {
        "norm": (100, Placement(P(None), "whole", 1)),
        "table": (300, Placement(P(None), "whole", 1)),
        "kernel": (800, Placement(P("fsdp"), "embed→fsdp", 4)),
    }
    sizes = {**ONES, "fsdp": 4}
    expected = (
        "sharding.storage: 33% of parameter bytes would be whole on every device "
        "(limit 10%), the "
        "largest table; give one of its axes a mesh axis, or raise "
        "sharding.max_unsharded"
    )
    assert message(check_unsharded_share, num_bytes, sizes, 0.1) == expected
    assert message(check_unsharded_share, num_bytes, sizes, 0.33) == expected.replace(
        "10%", "33%"
    )
    check_unsharded_share(num_bytes, sizes, 0.34)
    # A mesh that splits no parameters may hold them whole.
    check_unsharded_share(num_bytes, {**ONES, "data": 8, "context": 2}, 0.0)


def test_rules_on_a_mesh_leave_out_axes_of_size_one():
    rules = AxisRules(
        batch=("data", "fsdp", "expert"), embed="fsdp", mlp="tensor", vocab=None
    )
    assert rules.embed == ("fsdp",)
    assert rules.vocab == ()
    on = rules.for_mesh({**ONES, "data": 2, "tensor": 4, "expert": 2})
    assert on == AxisRules(batch=("data", "expert"), mlp="tensor")
    assert on.spec("batch", None, "embed", "mlp") == P(
        ("data", "expert"), None, None, "tensor"
    )
    assert rules.for_mesh(ONES) == AxisRules()


SIZES = {**ONES, "fsdp": 4, "tensor": 2, "data": 3}
BOTH = AxisRules(embed=("data", "fsdp"), mlp=("tensor", "fsdp"))


def test_a_placement_names_its_rules():
    shape, axes = (5, 8, 6, 3), ("layers", "embed", "heads", "head_dim")
    assert resolve_placement("w", shape, axes, STORAGE, SIZES) == Placement(
        spec=P("stage", ("fsdp", "expert"), "tensor", None),
        rule="layers→stage, embed→fsdp+expert, heads→tensor",
        num_shards=8,
    )
    placement = resolve_placement("scale", (7,), (None,), STORAGE, SIZES)
    assert placement == Placement(P(None), "whole", 1)


@pytest.mark.parametrize(
    ("shape", "axes", "rules", "expected"),
    [
        (
            (8, 50257),
            ("embed", "vocab"),
            STORAGE,
            "w: vocab=50257 does not divide over tensor=2; change the mesh to a "
            "divisor of 50257, "
            "or set 'vocab' to null in sharding.storage and sharding.compute to keep "
            "it whole",
        ),
        (
            (24, 8),
            ("embed", "mlp"),
            BOTH,
            "w: axes embed and mlp are both on mesh axis 'fsdp'; give one of them "
            "another mesh "
            "axis, or null",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(shape, axes, rules, expected):
    assert message(resolve_placement, "w", shape, axes, rules, SIZES) == expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (
            {"seq": "context", "heads": ("tensor", "context")},
            "sharding.compute: axes seq and heads are both on mesh axis 'context'; "
            "give one of "
            "them another mesh axis, or null",
        ),
        (
            {"embed": "fsdp"},
            "sharding.compute.embed: mesh axis 'fsdp' splits the residual stream's "
            "width, which "
            "norms, experts and the loss need whole; set it to null "
            "(sharding.storage.embed splits "
            "stored weights)",
        ),
        (
            {"head_dim": "tensor"},
            "sharding.compute.head_dim: mesh axis 'tensor' splits a head's width, "
            "which attention "
            "needs whole; set it to null (sharding.storage.head_dim splits stored "
            "weights)",
        ),
    ],
)
def test_activations_split_twice_or_in_their_width_are_refused(rules, expected):
    check_activation_rules(ShardingConfig().compute)
    assert message(check_activation_rules, AxisRules(**rules)) == expected
