"""Eight virtual CPU devices for every test, and meshes over them."""

import gc
import os
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import settings
from jax.sharding import Mesh

# Before any test touches a device: JAX reads these when its first backend starts.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Two threads a virtual device: one may wait for its peers in a step that holds up the
# next. With one each, XLA:CPU's default on few cores, steps that are started ahead may
# stop for good.
os.environ["PJRT_NPROC"] = "16"

# What is traced and compiled stays, in millions of objects. Looking through them after
# every 700 new ones takes a tenth of the time of tests that compile, and more.
gc.set_threshold(200_000)

# The same examples in every run, on every machine, however slow.
settings.register_profile(
    "maxlm", derandomize=True, deadline=None, max_examples=25, database=None
)
settings.load_profile("maxlm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first: no worker ends with one of them while others
    rest."""
    items.sort(key=lambda item: item.path.parent.name not in ("train", "tune", "tasks"))


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_let_go() -> Iterator[None]:
    """Drops compiled programs when they hold many memory maps, of which Linux gives a
    process 65,530; memory comes free with them."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _small_arrays_are_saved_by_one_device() -> None:
    """Orbax compiles a program for every part of an array that copies of it share the
    saving of, dozens for each mesh: only the largest arrays are shared here, as all are
    where hosts are."""
    import orbax.checkpoint as ocp

    handler: Any = ocp.type_handlers.get_type_handler(jax.Array)
    handler._min_slice_bytes_for_replica_parallel = 4096


@pytest.fixture(scope="session")
def mesh() -> Callable[..., Mesh]:
    """``mesh(fsdp=2, tensor=2)``: an explicit mesh over as many of the devices; others
    are 1."""
    from maxlm.sharding import MeshConfig, make_mesh

    def make(**axes: int) -> Mesh:
        sizes = {"fsdp": 1, **axes}
        return make_mesh(MeshConfig(**sizes), jax.devices()[: prod(sizes.values())])

    return make


@pytest.fixture(scope="session")
def one_device_mesh(mesh) -> Mesh:
    """The mesh of a laptop: every axis of size 1."""
    return mesh()


@pytest.fixture(scope="session")
def _compilation_cache(tmp_path_factory) -> str:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the base of one worker: both share
        folder = folder.parent
    return str(folder / "compiled")


@pytest.fixture
def compiled_once(_compilation_cache) -> Iterator[None]:
    """JAX's compilation cache, on disk, for tests that train in this process."""
    from jax.experimental.compilation_cache import compilation_cache

    settings = {
        "jax_compilation_cache_dir": _compilation_cache,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray cluster of two nodes, for no longer than it is used: its daemons never
    rest."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
