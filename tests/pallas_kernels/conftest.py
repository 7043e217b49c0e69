"""What tests of kernels share."""

import pytest

from pallas_kernels.cpu import load_kernels


@pytest.fixture
def cpu_kernels():
    """Kernels in C++, compiled."""
    if not load_kernels():
        pytest.skip("no C++ compiler")
