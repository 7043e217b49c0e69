"""What tests of several parts of the data package share."""

import pytest


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray cluster of two nodes, for no longer than it is used: its daemons never rest."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
