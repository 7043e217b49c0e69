"""Casting: exact or refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import MaxlmError
from maxlm.huggingface.files import NUMPY, TensorDtypes, cast_values, split_into_slabs

F32 = np.dtype(np.float32)
SMALL = [NUMPY[name] for name in ("BF16", "F16", "F8_E4M3", "F8_E5M2")]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_every_small_number_survives_fp32(dtype):
    bits = np.arange(1 << (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}")
    values = bits.view(dtype)
    wide = cast_values(values, F32, where="x")
    again = cast_values(wide, dtype, where="x")
    with np.errstate(invalid="ignore"):  # some are signalling
        number = ~np.isnan(values)
    assert number.sum() > 200
    np.testing.assert_array_equal(again.view(bits.dtype)[number], bits[number])
    assert np.isnan(again[~number]).all()


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_what_would_be_rounded_is_refused_unless_asked(dtype):
    values = np.array([1.0, 1.0001], np.float32)
    with pytest.raises(MaxlmError) as error:
        cast_values(values, dtype, where="a.weight")
    assert str(error.value) == (
        f"a.weight: its float32 values would be rounded to {dtype.name}; "
        "ask for that outright, or for a format that holds them"
    )
    np.testing.assert_array_equal(
        cast_values(values, dtype, where="a", lossy=True), [1, 1]
    )


@pytest.mark.parametrize(
    ("dtype", "value"), [("F16", 7e4), ("F8_E4M3", 500.0), ("F32", 1e300)]
)
def test_what_would_become_infinite_is_always_refused(dtype, value):
    values = np.array([1.0, -value], np.float64)
    with pytest.raises(MaxlmError, match=r"w: values too large for .*; choose"):
        cast_values(values, NUMPY[dtype], where="w", lossy=True)


@given(shape=st.lists(st.integers(0, 5), max_size=3), turned=st.booleans())
def test_slabs_are_the_values_in_order(shape, turned):
    values = np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    values = values.T if turned else values
    got = [slab.reshape(-1) for slab in split_into_slabs(values)]
    np.testing.assert_array_equal(
        np.concatenate([np.zeros(0), *got]), values.reshape(-1)
    )


def test_the_commonest_format_is_the_default():
    kinds = {"a": "BF16", "b": "F32", "c": "BF16"}
    dtypes = TensorDtypes.from_dtypes(kinds)
    assert dtypes == TensorDtypes(default="BF16", exceptions={"b": "F32"})
    assert {name: dtypes.get_dtype(name) for name in kinds} == kinds
    assert TensorDtypes.model_validate(dtypes.model_dump()) == dtypes
