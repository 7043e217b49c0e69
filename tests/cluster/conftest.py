"""One SLURM for all tests here."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cluster.slurm import missing, slurm


@pytest.fixture(scope="session")
def scheduler() -> Iterator[Mapping[str, str]]:
    """The environment in which SLURM's programs find two idle nodes.

    Without SLURM tests are skipped, or fail with MAXLM_REQUIRE_CLUSTER=1 in the
    environment.
    """
    if reason := missing():
        require = os.environ.get("MAXLM_REQUIRE_CLUSTER") == "1"
        (pytest.fail if require else pytest.skip)(reason)
    # pytest's own folders have names too long for sockets.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,
        slurm(Path(folder)) as environ,
    ):
        yield environ
