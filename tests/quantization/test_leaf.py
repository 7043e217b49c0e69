"""A model with quantized matrices computes what one with their values does."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from maxlm.models.architectures.transformer import Decoder
from maxlm.models.params import (
    Params,
    ParamSpec,
    bind,
    bind_specs,
    flatten_names,
    init_params,
    is_leaf,
    merge_packed,
    param_specs,
    select_dense_specs,
)
from maxlm.quantization import product
from maxlm.quantization.leaf import QuantizedParam
from maxlm.sharding import ShardingConfig, jit_sharded
from tests.models.building import LLAMA_GQA
from tests.quantization.rounding import RoundedFormat

TOKENS = np.random.default_rng(0).integers(0, 37, (4, 12)).astype(np.int32)
POSITIONS = np.broadcast_to(np.arange(12, dtype=np.int32), TOKENS.shape)


def quantize_specs(specs: Params, format: RoundedFormat) -> Params:
    """Quantizes the matrices and tables that blocks of the format divide."""

    def quantize(spec: ParamSpec) -> Any:
        is_matrix = spec.role == "matrix" or spec.role == "table"
        if not is_matrix or len(spec.shape) < 2 or "router" in spec.axes:
            return spec
        leaf = QuantizedParam.declare(spec, format)
        return leaf if leaf.form.num_inputs % format.group == 0 else spec

    return jax.tree.map(quantize, specs)


def place(model: Decoder, on: Any) -> tuple[Params, Params]:
    """The specs' shardings in the default storage layout, and initial parameters."""
    storage = ShardingConfig().storage.for_mesh(dict(on.shape))
    specs = param_specs(model)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(on, storage.spec(*spec.axes)), specs
    )
    params = jit_sharded(partial(init_params, specs), shardings)(jax.random.key(0))
    return shardings, params


@pytest.mark.heavy
@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("is_shared", [False, True])
def test_losses_and_gradients_are_those_of_the_values(
    mesh, sizes, is_shared, monkeypatch
):
    # Some products in parts, as large ones are.
    monkeypatch.setattr(product, "DENSE_BYTES", 256)
    mlp = LLAMA_GQA.mlp.model_copy(update={"d_ff": 24})
    config = LLAMA_GQA.model_copy(update={"vocab_size": 42, "d_model": 16, "mlp": mlp})
    on = mesh(**sizes)
    with jax.set_mesh(on):
        rules = ShardingConfig().compute.for_mesh(dict(on.shape))
        dense = Decoder(config, rules=rules, dtype=jnp.float32)
        specs = param_specs(dense)
        model = bind_specs(dense, quantize_specs(specs, RoundedFormat(4, is_shared)))
        packed_names = [
            name
            for name, spec in flatten_names(param_specs(model), is_leaf).items()
            if is_leaf(spec)
        ]
        assert len(packed_names) == 9
        assert flatten_names(select_dense_specs(param_specs(model))) == flatten_names(
            specs
        )
        _, params = place(model, on)
        values = merge_packed(params)

        spec = rules.spec("batch", "residual")
        tokens = jax.device_put(TOKENS, NamedSharding(on, spec))
        positions = jax.device_put(POSITIONS, NamedSharding(on, spec))

        def compute(model: Decoder, params: Params):
            bound = bind(model, params)
            hidden, _ = bound(tokens, positions)
            logits = bound.logits(hidden)
            return jnp.sum(jnp.sin(logits)), logits

        def differentiate(model: Decoder, params: Params):
            norms = params["layers"]["mlp_norm"]

            def of_norms(norms: Params):
                layers = params["layers"] | {"mlp_norm": norms}
                return compute(model, params | {"layers": layers})

            return jax.value_and_grad(of_norms, has_aux=True)(norms)

        expected = jax.jit(partial(differentiate, dense))(values)
        result = jax.jit(partial(differentiate, model))(params)
    close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, result, expected)
