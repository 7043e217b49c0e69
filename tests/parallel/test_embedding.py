"""Table look-ups on shards: rows and gradients in every layout are NumPy's, ids outside
the table are NaN, and a table stored in columns is never gathered."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding

from maxlm.parallel.embedding import embed_tokens
from maxlm.parallel.local import Dims, get_layout, make_spec
from tests.models.building import QUICK

V, D = 14, 12
F, T, C = ("fsdp",), ("tensor",), ("context",)


class EmbeddingCase(NamedTuple):
    """A table [14, 12] and ids [4, 6]: the mesh axes of every dimension."""

    mesh: dict[str, int]
    stored: Dims
    used: Dims
    ids: Dims
    out: Dims


WHOLE = ((), ())
CASES = {
    "one device": EmbeddingCase({}, WHOLE, WHOLE, WHOLE, ((), (), ())),
    "columns, exchanged": EmbeddingCase(
        {"fsdp": 2}, ((), F), WHOLE, (F, ()), (F, (), ())
    ),
    "columns, gathered": EmbeddingCase(
        {"fsdp": 2}, ((), F), WHOLE, WHOLE, ((), (), ())
    ),
    "columns over batch and sequence": EmbeddingCase(
        {"fsdp": 2, "context": 3}, ((), ("fsdp", "context")), WHOLE, (F, C), (F, C, ())
    ),
    "rows": EmbeddingCase({"tensor": 2}, (T, ()), (T, ()), WHOLE, ((), (), ())),
    "rows, y split over the sequence": EmbeddingCase(
        {"tensor": 2}, (T, ()), (T, ()), WHOLE, ((), T, ())
    ),
    "all": EmbeddingCase(
        {"fsdp": 2, "context": 2, "tensor": 2},
        (T, F),
        (T, ()),
        (F, C),
        (F, C, ()),
    ),
}


def run(case: EmbeddingCase, table, ids, d_y):
    y, back = jax.vjp(
        lambda t: embed_tokens(t, ids, case.used, case.out, jnp.float32), table
    )
    (d_table,) = back(d_y)
    assert get_layout(d_table) == case.stored
    assert get_layout(y) == case.out
    return y, d_table


def arguments(case: EmbeddingCase, on: Mesh, ids: np.ndarray):
    draw = np.random.default_rng(0).standard_normal
    table = draw((V, D)).astype(np.float32)
    d_y = draw((*ids.shape, D)).astype(np.float32)

    def put(array, dims):
        return jax.device_put(array, NamedSharding(on, make_spec(dims)))

    placed = put(table, case.stored), put(ids, case.ids), put(d_y, case.out)
    return placed, table, d_y


@pytest.mark.parametrize("name", CASES)
def test_rows_and_gradients(name, mesh):
    """Ids repeat, and one of each kind is outside the table: NaN, and no gradient
    anywhere."""
    case = CASES[name]
    on = mesh(**case.mesh)
    ids = np.random.default_rng(1).integers(0, V, (4, 6), dtype=np.int32)
    ids[0, 1] = -1
    ids[3, 5] = V
    placed, table, d_y = arguments(case, on, ids)
    with jax.set_mesh(on):
        y, d_table = jax.jit(lambda *a: run(case, *a), compiler_options=QUICK)(*placed)
    known = (ids >= 0) & (ids < V)
    want = np.where(known[..., None], table[np.where(known, ids, 0)], np.nan)
    np.testing.assert_array_equal(y, want)
    gradient = np.zeros((V, D))
    np.add.at(gradient, ids[known], d_y[known].astype(np.float64))
    np.testing.assert_allclose(d_table, gradient, rtol=1e-5, atol=1e-6)


def test_columns_stay_where_they_are(mesh):
    """Nothing that crosses the wire has the table's size, or a share of its rows'
    count."""
    case = CASES["columns, exchanged"]
    on = mesh(**case.mesh)
    ids = np.zeros((4, 6), np.int32)
    placed, _, _ = arguments(case, on, ids)
    with jax.set_mesh(on):
        text = (
            jax.jit(lambda *a: run(case, *a))
            .lower(*placed)
            .compile(compiler_options=QUICK)
        )
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    results = re.findall(rf" = (.*?) (?:{kinds})(?:-start)?\(", text.as_text())
    assert results
    assert not [r for r in results if re.search(rf"f32\[(?:\d+,)*{V}(?:,\d+)*\]", r)]
