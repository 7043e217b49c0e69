"""The held-out split."""

import pytest

from maxlm.data.documents import is_heldout


def test_known_hashes():
    # sha256("abc") = ba7816bf..., sha256("") = e3b0c442... (FIPS 180-2): 0.72839, 0.88942.
    assert is_heldout(b"abc", 0.7284)
    assert not is_heldout("abc", 0.7283)
    assert is_heldout("", 0.8895)
    assert not is_heldout(b"", 0.8894)


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_share(fraction):
    n = 20_000
    share = sum(is_heldout(str(i), fraction) for i in range(n)) / n
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / n) ** 0.5
