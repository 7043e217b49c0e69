"""What tests of kernels for CPUs share."""

import pytest

from maxlm.inference.cpu.library import load_library


@pytest.fixture
def cpu_kernels():
    """Kernels in C++, compiled."""
    if load_library() is None:
        pytest.skip("no C++ compiler")
