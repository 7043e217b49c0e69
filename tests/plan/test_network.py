"""What runs over what, and how long that takes, against figures worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config.load import load_config
from maxlm.plan.hardware import CHIPS
from maxlm.plan.network import Network
from maxlm.plan.topology import parse_topology
from maxlm.plan.workload import MeshPartitioning
from maxlm.run.config import RunConfig
from maxlm.sharding import MESH_AXES

CONFIG = load_config(RunConfig, "llama2_7b").value


def network(name: str) -> Network:
    topology = parse_topology(name)
    return Network(topology, CHIPS[topology.kind])


def split(**sizes: int) -> MeshPartitioning:
    return MeshPartitioning(CONFIG, {axis: sizes.get(axis, 1) for axis in MESH_AXES})


def test_a_whole_torus_uses_all_its_links():
    """v5p:4x4x4, six links of 90 GB/s each way."""
    taken = network("v5p-128").estimate_seconds(
        "all-gather", ("fsdp",), 64e9, split(fsdp=64)
    )
    assert float(taken) == pytest.approx(63e9 / (6 * 90e9), rel=0.001)
    # An axis along one dimension uses two.
    mesh = split(fsdp=16, tensor=4)
    taken = network("v5p-128").estimate_seconds(
        "reduce-scatter", ("tensor",), 1e9, mesh
    )
    assert float(taken) == pytest.approx(0.75e9 / (2 * 90e9), rel=0.01)


def test_a_slice_without_rings_has_half():

    def seconds(chips: int) -> float:
        machine = network(f"v5e-{chips}")
        mesh = split(fsdp=chips)
        return float(machine.estimate_seconds("all-gather", ("fsdp",), 1e12, mesh))

    assert seconds(64) / seconds(256) == pytest.approx(
        2 * (63 / 64) / (255 / 256), rel=0.01
    )


def test_between_slices_goes_what_a_slice_has_summed():
    """Each of 256 chips all-reduces a 256th over the network: 2 · 31/32 of it at 3.125
    GB/s."""
    mesh = split(data=32, fsdp=256)
    taken = network("32xv5e-256").estimate_seconds("all-reduce", ("data",), 1e9, mesh)
    assert float(taken) == pytest.approx(2 * 31 / 32 * 1e9 / 3.125e9, rel=0.001)
    both = network("32xv5e-256").estimate_seconds(
        "all-reduce", ("data", "fsdp"), 256e9, mesh
    )
    inside = 2 * 255 / 256 * 256e9 / (4 * 45e9)
    assert float(both) == pytest.approx(inside + 2 * 31 / 32 * 1e9 / 3.125e9, rel=0.001)


def test_gpus_within_a_host_and_between_hosts():
    hosts = network("h100x64")
    near = hosts.estimate_seconds(
        "all-gather", ("tensor",), 8e9, split(data=8, tensor=8)
    )
    assert float(near) == pytest.approx(7e9 / 450e9, rel=0.01)
    # A ring of all leaves each host once with eight cards' worth of network: 400 GB/s.
    far = hosts.estimate_seconds("all-gather", ("fsdp",), 64e9, split(fsdp=64))
    assert float(far) == pytest.approx(63e9 / 400e9, rel=0.01)
    # One of a host's eight GPUs in each group: its own card alone.
    alone = hosts.estimate_seconds("all-reduce", ("data",), 1e9, split(data=8, fsdp=8))
    assert float(alone) == pytest.approx(2 * 7 / 8 * 1e9 / 50e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "sizes", "axes", "link"),
    [
        ("h100x64", {"data": 8, "fsdp": 8}, ("data",), "network"),
        ("h100x64", {"fsdp": 64}, ("fsdp",), "NVLink + network"),
        ("2xv5p-128", {"data": 4, "fsdp": 32}, ("data",), "ICI + DCN"),
        ("2xv5p-128", {"data": 4, "fsdp": 32}, ("fsdp",), "ICI"),
        ("2xv5p-128", {"stage": 2, "fsdp": 64}, ("stage",), "DCN"),
    ],
)
def test_links_in_words(name, sizes, axes, link):
    assert network(name).describe_link(axes, split(**{"fsdp": 1, **sizes})) == link


@given(
    name=st.sampled_from(["v5p-512", "4xv5e-64", "h100x256"]),
    kind=st.sampled_from(
        ["all-gather", "all-reduce", "all-to-all", "collective-permute"]
    ),
    axes=st.sampled_from(
        [("data",), ("fsdp",), ("tensor",), ("data", "fsdp"), MESH_AXES]
    ),
)
def test_many_meshes_at_once_are_each_by_itself(name, kind, axes):
    meshes = [(4, 64, 1, 1), (4, 16, 1, 4), (8, 8, 2, 2), (32, 8, 1, 1), (256, 1, 1, 1)]
    names = ("data", "fsdp", "context", "tensor")
    splits = [split(**dict(zip(names, mesh, strict=True))) for mesh in meshes]
    columns = {
        axis: np.array([one.sizes[axis] for one in splits], float) for axis in MESH_AXES
    }
    every = MeshPartitioning(CONFIG, columns)
    machine = network(name)
    together = np.broadcast_to(
        machine.estimate_seconds(kind, axes, 1e9, every), len(meshes)
    )
    alone = [float(machine.estimate_seconds(kind, axes, 1e9, one)) for one in splits]
    assert together == pytest.approx(alone, rel=1e-12)
    assert all(t >= 0 for t in alone)
