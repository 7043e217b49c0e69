"""Paged attention in C++ equals float64 attention over each row's own tokens."""

import pytest

from maxlm.inference.cpu import paged_attention
from tests.pallas_kernels.paged_cases import PagedCase, check
from tests.pallas_kernels.test_paged_attention import (
    CASES,
    WINDOWED,
    check_independence,
)

pytestmark = pytest.mark.usefixtures("cpu_kernels")

SUPPORTED = {
    **{name: case for name, case in CASES.items() if name.startswith("decode")},
    "one row": CASES["one row"],
    "latent": CASES["latent"],
    "window": WINDOWED,
    "ragged": CASES["ragged"],
    "chunks of positions": CASES["chunks of positions"],
    "mixed, limits": CASES["mixed, limits"],
    "a long chunk": PagedCase(
        [(300, 1), (400, 170), (3, 5)],
        (6, 2, 32, 32),
        num_uniform=1,
        padding=2,
        window=130,
    ),
    "mixed, everything": CASES["mixed, everything"]._replace(heads=(10, 2, 48, 80)),
}


class OnlyInCpp:
    """The kernel; it fails where XLA would be asked."""

    forward = staticmethod(paged_attention.forward)

    @staticmethod
    def supports(operands, params):
        assert paged_attention.supports(operands, params)
        return True


@pytest.mark.parametrize("case", SUPPORTED)
def test_the_kernel_equals_the_reference(case):
    check(SUPPORTED[case], tolerance=2e-6, kernel=OnlyInCpp())


def test_other_rows_change_nothing():
    """Bit for bit: their lengths, tokens and pages, and all pages that are nobody's."""
    check_independence({"kernel": OnlyInCpp()})
    long = PagedCase([(300, 1), (200, 1), (750, 40)], (2, 1, 64, 64), num_uniform=2)
    check_independence({"kernel": OnlyInCpp()}, long)


@pytest.mark.parametrize("case", ["bf16", "int8", "mixed, everything"])
def test_xla_attends_where_the_kernel_does_not(case):
    """To pages of other dtypes, and heads that fill no vectors."""
    tolerance = 2e-2 if case == "bf16" else 2e-5
    check(CASES[case], tolerance=tolerance, kernel=paged_attention)
