"""Names of machines mean what their vendors mean."""

from math import prod

import pytest

from maxlm.config import MaxlmError
from maxlm.plan.topology import parse_topology

# name → (platform, as the compiler calls it, devices)
KNOWN = {
    "v5p-8": ("tpu", "v5p:2x2x1", 4),
    "v5p-64": ("tpu", "v5p:4x4x2", 32),
    "v5p-128": ("tpu", "v5p:4x4x4", 64),
    "v4-32": ("tpu", "v4:4x2x2", 16),
    "v5e-256": ("tpu", "v5e:16x16", 256),
    "v5p:4x4x8": ("tpu", "v5p:4x4x8", 128),
    "tpu7x:2x2x1": ("tpu", "tpu7x:2x2x1", 8),
    "7x-128": ("tpu", "tpu7x:4x4x4", 128),
    "h100x64": ("gpu", "1x8x8", 64),
    "h100:2x4": ("gpu", "1x2x4", 8),
    "a100x16": ("gpu", "1x2x8", 16),
    "cpux8": ("cpu", "1x8", 8),
    "2xV5P-512": ("tpu", "v5p:8x8x4", 512),
}


@pytest.mark.parametrize("name", KNOWN)
def test_vendors_names(name):
    topology = parse_topology(name)
    assert (topology.platform, topology.compiler_name, topology.devices) == KNOWN[name]


NOT_KNOWN = {
    "v5p-96": "no standard slice",
    "h100x12": "whole number of hosts",
    "v9-8": "no machine is called",
    "h10x8": "did you mean h100",
    "v5p:4x4x6": "no standard slice",
    "0xv5p-8": "has no devices",
    "cpux1025": "more than 1,024",
    "h100x8000000000": "more than 1,048,576",
    "1000000000xv5p-512": "more than 1,048,576",
    "cpux0": "no machine is called",
    "v5e x 8": "not the name",
    "": "not the name",
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_names_of_no_machine(name):
    with pytest.raises(MaxlmError, match=NOT_KNOWN[name]):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "words", "wraps"),
    [
        ("v5p-64", "32 chips, 64 cores, 8 hosts of 4", [False] * 3),
        ("v5e-128", "128 chips, 32 hosts of 4", [False, True]),
        ("2xv5p-512", "2 slices of 8×8×4 v5p chips: 512 chips, 1024 cores", [True] * 3),
    ],
)
def test_what_a_name_counts(name, words, wraps):
    """From the vendors' pages: what a name counts, and which dimensions close to a
    ring."""
    topology = parse_topology(name)
    assert words in topology.description
    assert list(topology.wraps) == wraps


@pytest.mark.parametrize("chips", [64, 128, 192, 256, 512, 768, 4096])
def test_large_slices_are_as_cubic_as_they_can_be(chips):
    shape = parse_topology(f"v5p-{2 * chips}").shape
    assert prod(shape) == chips
    assert all(n % 4 == 0 for n in shape)
    sides = range(4, chips + 1, 4)
    cubes = [
        (a, b, chips // (a * b))
        for a in sides
        for b in sides
        if chips % (4 * a * b) == 0
    ]
    assert max(shape) == min(map(max, cubes))
