"""From logical axes to partitions: exact shard counts, loud errors, nothing dropped silently."""

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
    LOGICAL_AXES,
    MESH_AXES,
    AxisRules,
    MeshConfig,
    Placement,
    ShardingConfig,
    check_activations,
    check_unsharded_share,
    make_mesh,
    resolve_placement,
)
from tests.errors import message

ONES = dict.fromkeys(MESH_AXES, 1)
STORAGE = ShardingConfig().storage


@given(st.data())
def test_shards_times_bytes_per_device_is_the_whole(data):
    """On real meshes of eight devices: JAX splits an array into just as many distinct pieces."""
    axes = data.draw(st.permutations(["data", "fsdp", "tensor", "expert", "context"]))[:3]
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **dict.fromkeys(axes, 2)}))
    sizes = dict(mesh.shape)
    logical = data.draw(
        st.lists(st.sampled_from(LOGICAL_AXES), min_size=1, max_size=3, unique=True)
    )
    free, rules = list(MESH_AXES), {}
    for axis in logical:
        names = data.draw(st.lists(st.sampled_from(free), max_size=2, unique=True), axis)
        free = [name for name in free if name not in names]
        rules[axis] = tuple(names)
    ways = [prod(sizes[n] for n in rules[axis]) for axis in logical]
    shape = tuple(w * data.draw(st.integers(1, 3)) for w in ways)
    placement = resolve_placement("w", shape, logical, AxisRules(**rules), sizes)

    array = jax.device_put(np.zeros(shape, np.float32), NamedSharding(mesh, placement.spec))
    held = array.addressable_shards[0].data.nbytes
    assert placement.num_shards * held == array.nbytes
    assert placement.num_shards == len({str(s.index) for s in array.addressable_shards})
    used = Counter(n for axis in logical for n in rules[axis])
    assert placement.num_shards == prod(sizes[n] for n in used)


def test_a_placement_names_its_rules():
    sizes = {**ONES, "fsdp": 4, "tensor": 2, "data": 3}
    assert resolve_placement(
        "w", (5, 8, 6, 3), ("layers", "embed", "heads", "head_dim"), STORAGE, sizes
    ) == (
        Placement(
            spec=P("stage", ("fsdp", "expert"), "tensor", None),
            rule="layers→stage, embed→fsdp+expert, heads→tensor",
            num_shards=8,
        )
    )
    both = AxisRules(embed=("data", "fsdp"))
    assert resolve_placement("w", (24, 7), ("embed", None), both, sizes) == Placement(
        spec=P(("data", "fsdp"), None), rule="embed→data+fsdp", num_shards=12
    )
    assert resolve_placement("scale", (7,), (None,), STORAGE, sizes) == Placement(
        P(None), "whole", 1
    )


def test_an_axis_that_does_not_divide_is_refused():
    sizes = {**ONES, "fsdp": 4, "tensor": 2, "data": 3}
    assert message(
        resolve_placement, "head.kernel", (8, 50257), ("embed", "vocab"), STORAGE, sizes
    ) == (
        "head.kernel: vocab=50257 does not divide over tensor=2; change the mesh to a divisor of "
        "50257, or set 'vocab' to null in sharding.storage and sharding.compute to keep it whole"
    )
    both = AxisRules(embed=("data", "fsdp"))
    assert message(resolve_placement, "w", (8, 3), ("embed", None), both, sizes) == (
        "w: embed=8 does not divide over data=3·fsdp=4; change the mesh to a divisor of 8, "
        "or set 'embed' to null in sharding.storage and sharding.compute to keep it whole"
    )


def test_two_axes_on_one_mesh_axis_are_refused():
    rules, sizes = AxisRules(embed=("fsdp",), mlp=("tensor", "fsdp")), {**ONES, "fsdp": 2}
    assert message(resolve_placement, "layers.mlp.up", (4, 8), ("embed", "mlp"), rules, sizes) == (
        "layers.mlp.up: axes embed and mlp are both on mesh axis 'fsdp'; "
        "give one of them another mesh axis, or null"
    )
    assert message(resolve_placement, "w", (4, 4), ("embed", "embed"), rules, sizes) == (
        "w: axes embed and embed are both on mesh axis 'fsdp'; "
        "give one of them another mesh axis, or null"
    )


def test_activations_split_twice_or_in_their_width_are_refused():
    assert message(check_activations, AxisRules(seq="context", heads=("tensor", "context"))) == (
        "sharding.compute: axes seq and heads are both on mesh axis 'context'; give one of them "
        "another mesh axis, or null"
    )
    assert message(check_activations, AxisRules(batch="fsdp", residual="fsdp")) == (
        "sharding.compute: axes batch and residual are both on mesh axis 'fsdp'; give one of them "
        "another mesh axis, or null"
    )
    for axis in ("embed", "expert_embed"):
        assert message(check_activations, AxisRules(**{axis: "fsdp"})) == (
            f"sharding.compute.{axis}: mesh axis 'fsdp' splits the residual stream's width, which "
            f"norms, experts and the loss need whole; set it to null (sharding.storage.{axis} "
            "splits weights at rest)"
        )
    assert message(check_activations, AxisRules(head_dim="tensor")) == (
        "sharding.compute.head_dim: mesh axis 'tensor' splits a head's width, which attention "
        "needs whole; set it to null and split heads"
    )
    check_activations(ShardingConfig().compute)


def test_too_many_whole_bytes_are_refused():
    """100 bytes of `norm` and 300 of `table` are whole, of 1,200."""
    held = {
        "norm": (100, Placement(P(None), "whole", 1)),
        "table": (300, Placement(P(None), "whole", 1)),
        "kernel": (800, Placement(P("fsdp"), "embed→fsdp", 4)),
    }
    sizes = {**ONES, "fsdp": 4}
    expected = (
        "sharding.storage: 33% of parameter bytes would be whole on every device (limit 10%), the "
        "largest table; give one of its axes a mesh axis, or raise sharding.max_unsharded"
    )
    assert message(check_unsharded_share, held, sizes, 0.1) == expected
    assert message(check_unsharded_share, held, sizes, 0.33) == expected.replace("10%", "33%")
    check_unsharded_share(held, sizes, 0.34)


@pytest.mark.parametrize("axis", ["data", "context"])
def test_meshes_that_split_no_parameters_may_hold_them_whole(axis):
    held = {"kernel": (800, Placement(P(None), "whole", 1))}
    check_unsharded_share(held, {**ONES, axis: 8}, 0.0)
    assert "100% of parameter bytes" in message(
        check_unsharded_share, held, {**ONES, axis: 8, "stage": 2}, 0.99
    )


def test_rules_on_a_mesh_leave_out_axes_of_size_one():
    rules = AxisRules(batch=("data", "fsdp", "expert"), embed="fsdp", mlp="tensor", vocab=None)
    assert rules.embed == ("fsdp",)
    assert rules.vocab == ()
    on = rules.for_mesh({**ONES, "data": 2, "tensor": 4, "expert": 2})
    assert on == AxisRules(batch=("data", "expert"), mlp="tensor")
    assert on.spec("batch", None, "embed", "mlp") == P(("data", "expert"), None, None, "tensor")
    assert rules.for_mesh(ONES) == AxisRules()


def test_rules_name_only_axes_that_exist():
    with pytest.raises(ValueError, match="Input should be 'stage', 'data', 'fsdp'"):
        AxisRules(embed="fspd")
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        AxisRules.model_validate({"embd": "fsdp"})
