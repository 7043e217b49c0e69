"""Which device stands where: along a torus, across slices by `data` or `stage`,
`tensor` within a host of GPUs."""

from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.sharding import MESH_AXES
from maxlm.sharding.links import arrange_devices
from tests.errors import message


@dataclass(frozen=True)
class Device:
    """What is asked of a device."""

    id: int
    process_index: int
    platform: str
    device_kind: str
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    slice_index: int = 0


def tpus(
    shape: tuple[int, int, int], slices: int = 1, kind: str = "TPU v5"
) -> list[Device]:
    """Chips of slices, four a host."""
    chips = prod(shape)
    return [
        Device(
            id=number * chips + i,
            process_index=(number * chips + i) // 4,
            platform="tpu",
            device_kind=kind,
            coords=at[::-1],  # x runs fastest
            slice_index=number,
        )
        for number in range(slices)
        for i, at in enumerate(product(*(range(n) for n in shape[::-1])))
    ]


def gpus(hosts: int, per_host: int = 8) -> list[Device]:
    """In an order of no help."""
    devices = [
        Device(i, i // per_host, "gpu", "NVIDIA H100 80GB HBM3")
        for i in range(hosts * per_host)
    ]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


def sizes(**axes: int) -> dict[str, int]:
    return {axis: axes.get(axis, 1) for axis in MESH_AXES}


def groups(grid: np.ndarray, axis: str) -> np.ndarray:
    """Devices that differ along one axis alone, one group a row."""
    dim = MESH_AXES.index(axis)
    return np.moveaxis(grid, dim, -1).reshape(-1, grid.shape[dim])


def hops(a: Device, b: Device, torus: tuple[int, ...]) -> int:
    steps = [abs(p - q) for p, q in zip(a.coords, b.coords, strict=True)]
    return sum(min(s, n - s) for s, n in zip(steps, torus, strict=True))


@pytest.mark.parametrize(
    ("shape", "kind", "axes"),
    [
        ((4, 4, 4), "TPU v5", {"fsdp": 16, "tensor": 4}),
        ((4, 4, 4), "TPU v4", {"data": 4, "context": 4, "tensor": 4}),
        ((8, 8, 1), "TPU v6 lite", {"fsdp": 16, "tensor": 4}),
    ],
)
def test_neighbours_on_a_torus_are_neighbours_in_the_mesh(shape, kind, axes):
    devices = tpus(shape, kind=kind)
    grid = arrange_devices(sizes(**axes), devices)
    assert grid.shape == tuple(sizes(**axes).values())
    assert sorted(d.id for d in grid.flat) == [d.id for d in devices]
    rings = groups(grid, "tensor")
    assert all(hops(a, b, shape) == 1 for row in rings for a, b in pairwise(row))


@pytest.mark.parametrize("fault", [NotImplementedError, ValueError])
def test_a_mesh_that_jax_finds_no_place_for(fault, monkeypatch):
    """Which meshes these are, and how JAX says so, differs between its versions."""

    def nowhere(*args, **options):
        raise fault("internal")

    monkeypatch.setattr("jax.experimental.mesh_utils.create_device_mesh", nowhere)
    with pytest.raises(MaxlmError, match="the mesh data=2, fsdp=8 cannot be laid"):
        arrange_devices(sizes(data=2, fsdp=8), tpus((4, 2, 2)))


@pytest.mark.parametrize("axis", ["data", "stage"])
def test_slices_are_crossed_by_data_or_else_by_stage(axis):
    devices = tpus((2, 2, 1), slices=2)
    grid = arrange_devices(sizes(**{axis: 2}, fsdp=2, tensor=2), devices)
    assert {len({d.slice_index for d in row}) for row in groups(grid, axis)} == {2}
    for other in {"fsdp", "tensor"}:
        assert {len({d.slice_index for d in row}) for row in groups(grid, other)} == {1}


def test_tensor_stays_within_a_host_of_gpus():
    grid = arrange_devices(sizes(fsdp=4, tensor=4), gpus(2))
    for row in groups(grid, "tensor"):
        assert len({d.process_index for d in row}) == 1
        assert [d.id for d in row] == list(range(row[0].id, row[0].id + 4))


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        (
            {"fsdp": 8},
            tpus((2, 2, 1), slices=2),
            "mesh: 2 slices, but neither data=1 nor stage=1 divides over them; set "
            "mesh.data to a "
            "multiple of 2: only it or stage may cross slices",
        ),
        (
            {"tensor": 16},
            gpus(2),
            "mesh.tensor: tensor=16 would lie across hosts of 8 GPUs; use a divisor of "
            "8",
        ),
    ],
)
def test_axes_that_may_not_cross_slices_or_hosts_are_refused(axes, devices, expected):
    assert message(arrange_devices, sizes(**axes), devices) == expected
