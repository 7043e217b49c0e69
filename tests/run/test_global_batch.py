"""Rows that a host made end where the mesh wants them, whole and in order."""

import jax
import numpy as np
import pytest

from maxlm.data.batch_source import BatchArraySpec
from maxlm.run.global_batch import (
    batch_sharding,
    get_local_row_indices,
    make_global_batch,
)
from maxlm.sharding import ShardingConfig

ARRAYS = {name: BatchArraySpec.of_tokens(5) for name in ("tokens", "weights")}
LEADS = {"one": (1, 12), "three": (3, 4)}


@pytest.mark.parametrize(
    "axes", [{}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str
)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
def test_a_batch_is_its_rows_in_order(mesh, axes, lead):
    grid = mesh(**axes)
    rules = ShardingConfig().compute.for_mesh(dict(grid.shape))
    sharding = batch_sharding(rules, grid)
    rows = get_local_row_indices(batch_sharding(rules, grid, ()), lead)
    assert rows == list(range(12))

    tokens = np.arange(60, dtype=np.int32).reshape(12, 5)
    batch = make_global_batch(
        {"tokens": tokens, "weights": tokens / 2}, ARRAYS, rows, rules, grid, lead
    )
    np.testing.assert_array_equal(batch["tokens"], tokens.reshape(*lead, 5))
    np.testing.assert_array_equal(batch["weights"], tokens.reshape(*lead, 5) / 2)
    assert {array.sharding for array in batch.values()} == {sharding}
    # Every device holds its share of each micro-batch.
    ways = axes.get("data", 1) * axes.get("fsdp", 1)
    shard = batch["tokens"].addressable_shards[0].data
    assert shard.shape == (*lead[:-1], lead[-1] // ways, 5)


def test_arrays_may_have_any_shape_and_rows_and_tokens_any_order(mesh):
    grid = mesh(data=2, context=2)
    rules = ShardingConfig().compute.for_mesh(dict(grid.shape))
    arrays = {
        "pairs": BatchArraySpec((2, 4), np.int32, (None, "seq")),
        "scores": BatchArraySpec((), np.float32, ()),
    }
    rows = {"pairs": np.arange(32).reshape(4, 2, 4), "scores": np.arange(4.0)}
    order = np.array([3, 0, 1, 2])
    numbers = [2, 0, 3, 1]
    shuffled = {name: array[numbers] for name, array in rows.items()}
    batch = make_global_batch(shuffled, arrays, numbers, rules, grid, (2, 2), order)
    want = rows["pairs"][..., order].reshape(2, 2, 2, 4)
    np.testing.assert_array_equal(batch["pairs"], want)
    np.testing.assert_array_equal(batch["scores"], [[0, 1], [2, 3]])
    assert batch["pairs"].addressable_shards[0].data.shape == (2, 1, 2, 2)


class TwoProcesses:
    """A sharding of which this process has the first half of the devices."""

    def __init__(self, sharding: jax.sharding.NamedSharding):
        self._sharding = sharding

    def addressable_devices_indices_map(self, shape):
        everything = self._sharding.devices_indices_map(shape)
        return dict(list(everything.items())[: len(everything) // 2])


def test_a_process_makes_its_devices_rows_of_every_micro_batch(mesh):
    grid = mesh(data=2, fsdp=2, tensor=2)
    rules = ShardingConfig().compute.for_mesh(dict(grid.shape))
    half = TwoProcesses(batch_sharding(rules, grid, ()))
    assert get_local_row_indices(half, (2, 8)) == [0, 1, 2, 3, 8, 9, 10, 11]  # type: ignore[arg-type]
