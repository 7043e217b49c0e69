"""Names of machines mean what their vendors mean."""

import pytest

from maxlm.config import MaxlmError
from maxlm.plan.topology import parse_topology

# name → (platform, as the compiler calls it, devices)
KNOWN = {
    "v5p-8": ("tpu", "v5p:2x2x1", 4),
    "v5p-64": ("tpu", "v5p:4x4x2", 32),
    "v5p-128": ("tpu", "v5p:4x4x4", 64),
    "v5p-512": ("tpu", "v5p:8x8x4", 256),
    "v4-32": ("tpu", "v4:4x2x2", 16),
    "v5e-8": ("tpu", "v5e:2x4", 8),
    "v5e-256": ("tpu", "v5e:16x16", 256),
    "v6e-64": ("tpu", "v6e:8x8", 64),
    "v5p:4x4x6": ("tpu", "v5p:4x4x6", 96),
    "tpu7x:2x2x1": ("tpu", "tpu7x:2x2x1", 4),
    "2xv5p-512": ("tpu", "v5p:8x8x4", 512),
    "h100x64": ("gpu", "1x8x8", 64),
    "h100x4": ("gpu", "1x1x4", 4),
    "h100:2x4": ("gpu", "1x2x4", 8),
    "2xh100x64": ("gpu", "2x8x8", 128),
}


@pytest.mark.parametrize("name", KNOWN)
def test_vendors_names(name):
    found = parse_topology(name)
    assert (found.platform, found.compiler_name, found.devices) == KNOWN[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p-63", "no standard slice"),
        ("v5p-96", "no standard slice"),
        ("v6e-0", "no standard slice"),
        ("h100x12", "whole number of hosts"),
        ("v9-8", "no machine is called"),
        ("v5e x 8", "not the name"),
        ("", "not the name"),
    ],
)
def test_names_of_no_machine(name, message):
    with pytest.raises(MaxlmError, match=message):
        parse_topology(name)
