"""Promise: a linear map and both its gradients, whichever of its sides is wider, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.models.layers.linear import Linear
from maxlm.models.params import bind, param_specs
from maxlm.sharding import ShardingConfig, resolve_placement

SIDES = {
    "wider": ({"embed": 6}, {"mlp": 20}),
    "narrower": ({"mlp": 20}, {"embed": 6}),
    "to heads": ({"embed": 6}, {"heads": 4, "head_dim": 3}),
    "from heads": ({"heads": 4, "head_dim": 3}, {"embed": 6}),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["one", "eight"])
@pytest.mark.parametrize("side", SIDES)
def test_values_and_gradients_equal_the_formula(mesh, axes, side, dtype):
    inputs, outputs = SIDES[side]
    on, config = mesh(**axes), ShardingConfig()
    sizes = dict(on.shape)
    rules = config.compute.for_mesh(sizes)
    layer = Linear(inputs, outputs, bias=False, std=1.0, rules=rules, dtype=dtype)
    spec = param_specs(layer)["kernel"]
    draw = np.random.default_rng(0).normal
    x, kernel = draw(size=(4, 7, *inputs.values())), draw(size=spec.shape)
    d_y = draw(size=(4, 7, *outputs.values()))
    stored = resolve_placement(
        "", spec.shape, spec.axes, config.storage.for_mesh(sizes), sizes
    ).spec

    def put(array, partition):
        return jax.device_put(array.astype(np.float32), NamedSharding(on, partition))

    def run(kernel, x, d_y):
        y, back = jax.vjp(lambda k, x: bind(layer, {"kernel": k})(x), kernel, x)
        return y, *back(d_y.astype(dtype))

    with jax.set_mesh(on):
        y, d_kernel, d_x = jax.jit(run)(
            put(kernel, stored),
            put(x, rules.spec("batch", "seq", *inputs)),
            put(d_y, rules.spec("batch", "seq", *outputs)),
        )
    n = len(inputs)
    assert d_kernel.sharding.spec == PartitionSpec(*stored)
    assert (y.dtype, d_kernel.dtype) == (dtype, jnp.float32)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == jnp.float32 else {"rtol": 0.05, "atol": 0.2}
    last, lead = list(range(2, 2 + n)), list(range(n))
    np.testing.assert_allclose(y.astype(np.float32), np.tensordot(x, kernel, (last, lead)), **close)
    np.testing.assert_allclose(d_kernel, np.tensordot(x, d_y, ([0, 1], [0, 1])), **close)
    out = list(range(n, kernel.ndim))
    rest = list(range(2, d_y.ndim))
    np.testing.assert_allclose(d_x, np.tensordot(d_y, kernel, (rest, out)), **close)
