"""Gathers and scatters between layouts, in one step and in the two that TPUs want."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.parallel import local
from tests.models.building import QUICK


@pytest.fixture(params=["one step", "4 × 2", "2 × 4"])
def steps(request, monkeypatch):
    """How eight devices gather and scatter."""
    if request.param != "one step":
        monkeypatch.setattr(local, "get_platform", lambda: "tpu")
        monkeypatch.setattr(local, "STEP", {"4 × 2": 16, "2 × 4": 2}[request.param])


@pytest.mark.parametrize(
    ("shape", "dim"),
    # As TPUs want it, matrices are scattered in rows of lanes; the result is like any
    # other.
    [((24, 5, 7), 0), ((3, 40, 7), 1), ((3, 5, 56), 2), ((24, 384), 0), ((384, 24), 1)],
)
def test_partial_sums_are_reduced_to_the_shard_they_belong_to(shape, dim, mesh, steps):
    grid = mesh(data=2, fsdp=4)
    parts = np.random.default_rng(0).integers(-9, 9, (8, *shape)).astype(np.float32)
    have = ((),) * len(shape)
    want = tuple(("data", "fsdp") if d == dim else () for d in range(len(shape)))
    with jax.set_mesh(grid):
        put = jax.device_put(parts, NamedSharding(grid, P(("data", "fsdp"))))
        run = local.map_shards(
            lambda x: local.reduce(x[0], ("data", "fsdp"), have, want),
            P(("data", "fsdp")),
            local.make_spec(want),
        )
        got = jax.jit(run, compiler_options=QUICK)(put)
    assert got.sharding.spec == local.make_spec(want)
    np.testing.assert_array_equal(got, parts.sum(0))


BOTH = ("data", "fsdp")


@pytest.mark.parametrize(
    ("have", "want"),
    [
        (P(BOTH), P()),
        (P(None, None, BOTH), P()),
        (P(BOTH), P("data")),
        (P(BOTH), P(None, "fsdp")),
    ],
)
def test_an_array_moves_to_another_layout_and_keeps_its_values(have, want, mesh, steps):
    """By gathers where it is to be split less, by whatever it takes otherwise."""
    grid = mesh(data=2, fsdp=4)
    x = np.arange(16 * 12 * 8, dtype=np.float32).reshape(16, 12, 8)
    with jax.set_mesh(grid):
        put = jax.device_put(x, NamedSharding(grid, have))
        got = jax.jit(lambda x: local.gather_to_spec(x, want), compiler_options=QUICK)(
            put
        )
    assert local.get_layout(got) == local.parse_spec(want, 3)
    np.testing.assert_array_equal(got, x)


def test_a_layout_that_does_not_begin_with_the_other_is_refused(mesh):
    with (
        jax.set_mesh(mesh(data=2, fsdp=2)),
        pytest.raises(ValueError, match="does not begin with"),
    ):
        local.gather(np.zeros((4,)), (("fsdp",),), (("data",),))
