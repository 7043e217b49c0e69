"""Rows that a host made end where the mesh wants them, whole and in order."""

import jax
import numpy as np
import pytest

from maxlm.sharding import ShardingConfig
from maxlm.train.batch import batch_sharding, local_rows, put_batch

LEADS = {"one": (1, 12), "three": (3, 4)}


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("lead", LEADS.values(), ids=LEADS)
def test_a_batch_is_its_rows_in_order(mesh, axes, lead):
    grid = mesh(**axes)
    rules = ShardingConfig().compute.for_mesh(dict(grid.shape))
    sharding = batch_sharding(rules, grid)
    rows = local_rows(sharding, (*lead, 5))
    assert rows == list(range(12))

    tokens = np.arange(60, dtype=np.int32).reshape(12, 5)
    batch = put_batch({"tokens": tokens, "weights": tokens / 2}, rows, sharding, lead)
    np.testing.assert_array_equal(batch["tokens"], tokens.reshape(*lead, 5))
    np.testing.assert_array_equal(batch["weights"], tokens.reshape(*lead, 5) / 2)
    assert {array.sharding for array in batch.values()} == {sharding}
    # Every device holds its share of each micro-batch.
    ways = axes.get("data", 1) * axes.get("fsdp", 1)
    shard = batch["tokens"].addressable_shards[0].data
    assert shard.shape == (*lead[:-1], lead[-1] // ways, 5)


def test_rows_may_come_in_any_order(one_device_mesh):
    rules = ShardingConfig().compute.for_mesh(dict(one_device_mesh.shape))
    sharding = batch_sharding(rules, one_device_mesh)
    order = [2, 0, 3, 1]
    batch = put_batch({"tokens": np.array(order)[:, None] * 10}, order, sharding, (1, 4))
    np.testing.assert_array_equal(batch["tokens"][0, :, 0], [0, 10, 20, 30])


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
    half = TwoProcesses(batch_sharding(rules, grid))
    assert local_rows(half, (2, 8, 5)) == [0, 1, 2, 3, 8, 9, 10, 11]  # type: ignore[arg-type]
