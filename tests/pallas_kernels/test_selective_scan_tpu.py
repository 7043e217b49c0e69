"""The TPU's kernel, in the interpreter, equals the float64 loop, and its gradients those
of XLA's scan, which have a test of their own."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.selective_scan import selective_scan, tpu
from tests.pallas_kernels.test_selective_scan import draw, near, reference

pytestmark = pytest.mark.heavy

POISONED = pltpu.InterpretParams(
    uninitialized_memory="nan", out_of_bounds_reads="raise"
)
# Rows, tokens, channels, numbers of state; softplus of steps; starts of documents; dtype.
# Chunks are of 16 tokens here, and channels of 128 or 256.
CASES = {
    "ragged": (2, 37, 140, 3, True, True, jnp.float32),
    "a chunk alone": (1, 16, 128, 16, False, False, jnp.float32),
    "less than a chunk": (1, 3, 9, 8, True, False, jnp.float32),
    "bf16": (1, 33, 384, 5, True, True, jnp.bfloat16),
}


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setattr(tpu, "CHUNK", 16)
    for name in ("scan_forward", "scan_backward"):
        function = partial(getattr(tpu, name), interpret=POISONED)
        monkeypatch.setattr(tpu, name, function)


@pytest.mark.parametrize(
    "case",
    [
        "ragged",
        *(pytest.param(name, marks=pytest.mark.more) for name in list(CASES)[1:]),
    ],
)
def test_kernel_equals_the_loop(case):
    num_rows, num_tokens, channels, num_states, biased, has_starts, dtype = CASES[case]
    arrays = draw(num_rows, num_tokens, channels, num_states, seed=1, biased=biased)
    starts = arrays.pop("starts")
    if not has_starts:
        starts = np.zeros_like(starts)
    for name in ("x", "dt", "B", "C"):
        arrays[name] = jnp.asarray(arrays[name], dtype)
    rng = np.random.default_rng(2)
    by_y = rng.standard_normal(arrays["x"].shape)
    by_state = rng.standard_normal(arrays["initial_state"].shape)

    @partial(jax.jit, static_argnums=0)
    def run(backend, arrays):
        def loss(arrays):
            y, state = selective_scan(
                **arrays,
                starts=starts if has_starts else None,
                backend=backend,
                chunk_tokens=7,
            )
            return jnp.sum(by_y * y) + jnp.sum(by_state * state), (y, state)

        return jax.grad(loss, has_aux=True)(arrays)

    gradients, (y, state) = run("tpu", arrays)
    true_y, true_state = reference(**arrays, starts=starts)
    near(y.astype(jnp.float32), true_y, 2**-8 if dtype == jnp.bfloat16 else 2e-6)
    near(state, true_state, 2e-6)
    true_gradients, _ = run("xla", arrays)
    for name, gradient in gradients.items():
        truth = np.asarray(true_gradients[name], np.float64)
        # Rounded last in both.
        tolerance = 2**-8 if gradient.dtype == jnp.bfloat16 else 1e-5
        assert gradient.dtype == arrays[name].dtype
        near(gradient.astype(jnp.float32), truth, tolerance)
