"""Hosts as vendors cut slices, from their own tables."""

import pytest

from maxlm.launch.hosts import resolve_hosts
from maxlm.plan.topology import parse_topology

# Google Cloud, "TPU configurations" and "Plan TPUs in GKE": machine, hosts, chips a
# host, GKE's topology, Cloud TPU's type.
TPUS = [
    ("v4-8", 1, 4, "2x2x1", "v4-8"),
    ("v5p-8", 1, 4, "2x2x1", "v5p-8"),
    ("v5p-256", 32, 4, "4x4x8", "v5p-256"),
    ("v5e-8", 1, 8, "2x4", "v5litepod-8"),
    ("v5e-16", 4, 4, "4x4", "v5litepod-16"),
    ("v6e-256", 64, 4, "16x16", "v6e-256"),
]


@pytest.mark.parametrize(("name", "count", "chips", "topology", "kind"), TPUS)
def test_tpu_slices(name, count, chips, topology, kind):
    hosts = resolve_hosts(parse_topology(name), name, None)
    assert (hosts.count, hosts.devices, hosts.gke_topology) == (count, chips, topology)
    assert hosts.accelerator_type == kind
    words = f"{count} host{'s' if count > 1 else ''} of {chips}"
    assert parse_topology(name).description.endswith(words)
