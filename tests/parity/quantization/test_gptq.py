"""GPTQ's loss beside llm-compressor's, on the same matrix and Hessian."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("llmcompressor")

from compressed_tensors.quantization import QuantizationArgs  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # noqa: E402

from maxlm.quantization.algorithms.gptq import (  # noqa: E402
    GptqConfig,
    quantize_gptq,
)
from maxlm.quantization.algorithms.hessian import compute_proxy_loss  # noqa: E402
from maxlm.quantization.algorithms.rounding import fake_quantize  # noqa: E402
from maxlm.quantization.formats.integer import IntegerFormat  # noqa: E402


def quantize_there(
    weight: np.ndarray,
    hessian: np.ndarray,
    group: int,
    is_symmetric: bool,
    actorder: str | None,
) -> np.ndarray:
    """Returns what llm-compressor makes of a matrix, with its min-max scales."""
    arguments = QuantizationArgs(
        num_bits=4,
        type="int",
        strategy="group",
        group_size=group,
        symmetric=is_symmetric,
        actorder=actorder,
    )
    blocks = torch.tensor(weight).reshape(len(weight), -1, group)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
    values, _, is_plain = quantize_weight(
        torch.tensor(weight)[None],
        torch.tensor(hessian)[None],
        scale[None],
        zero[None],
        None,
        arguments,
    )
    assert not is_plain.any()
    return values[0].numpy()


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("actorder", [None, "static"])
def test_loss_at_most_llm_compressors(group, is_symmetric, actorder):
    random = np.random.default_rng(group)
    mixing = random.standard_normal((256, 256)) * np.exp(-np.arange(256) / 60)[:, None]
    inputs = random.standard_normal((600, 256)) @ mixing
    hessian = (inputs.T @ inputs / 600).astype(np.float32)
    weight = random.standard_normal((48, 256)).astype(np.float32)
    there = quantize_there(weight, hessian, group, is_symmetric, actorder)
    their_loss = compute_proxy_loss(jnp.asarray(weight - there), hessian)
    rounding = IntegerFormat(4, group, is_symmetric, scale_dtype="float32")
    nearest = fake_quantize(jnp.asarray(weight), rounding)
    nearest_loss = compute_proxy_loss(weight - nearest, hessian)
    act_order = "none" if actorder is None else "static"
    plain = GptqConfig(act_order=act_order, scales="original", clip_ratios=(1.0,))
    chosen = GptqConfig(act_order=act_order, refine_passes=1)
    for config in (plain, chosen):
        result = quantize_gptq(jnp.asarray(weight), hessian, rounding, config)
        assert result.loss <= 1.001 * their_loss
        assert result.loss < 0.5 * nearest_loss
