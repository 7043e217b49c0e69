"""Jobs on a Ray cluster of two nodes end as they do in local processes."""

import os
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.runtime.pool import RayExecutor, open_executor

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_cluster")


def square(x):
    return x * x, os.getpid()


def refuse(x):
    raise MaxlmError(f"no {x}", where="here", fix="give less")


def die_once(path):
    """Kills its process when called for the first time."""
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return "lived"


def test_results_come_from_other_processes():
    with open_executor("ray", None) as engine:
        assert list(engine.map(square, [])) == []
        results = list(engine.map(square, range(40)))
    assert sorted(value for value, _ in results) == [x * x for x in range(40)]
    assert os.getpid() not in {pid for _, pid in results}
    assert ray.is_initialized()  # a cluster that was there stays


def test_errors_arrive_as_they_are():
    with RayExecutor(1) as engine, pytest.raises(MaxlmError) as error:
        list(engine.map(refuse, ["way"]))
    assert (error.value.what, error.value.where, error.value.fix) == ("no way", "here", "give less")


def test_a_worker_that_dies_is_replaced(tmp_path):
    with RayExecutor() as engine:
        assert list(engine.map(die_once, [str(tmp_path / "marker")])) == ["lived"]
