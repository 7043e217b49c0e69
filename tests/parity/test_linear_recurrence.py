"""Linear recurrences in chunks against transformers' torch functions and fla-core's naive
ones: outputs, final states and gradients of every operand."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.parity.recurrence_oracles import ORACLES, measure_errors

CHUNK = 32


@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 163])
@pytest.mark.parametrize("name", ORACLES)
def test_outputs_and_gradients_are_theirs(name, tokens):
    try:
        oracle = ORACLES[name](tokens)
    except ImportError as error:
        pytest.skip(str(error))
    errors = measure_errors(oracle, CHUNK)
    assert errors.forward <= 1e-5
    assert errors.backward <= 1e-4
