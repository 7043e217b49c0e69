"""Weights that are published quantized, against transformers' own dequantization."""

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.integrations.finegrained_fp8 import Fp8Dequantize  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402

from maxlm.huggingface.quantized import (  # noqa: E402
    list_model_tensors,
    read_model_tensor,
)
from tests.huggingface.test_quantized import (  # noqa: E402
    FP8,
    MXFP4,
    draw_mxfp4,
    write_folder,
)


def test_mxfp4(tmp_path):
    codes, scales = draw_mxfp4(np.random.default_rng(0), (5, 7, 3))
    folder = write_folder(tmp_path, MXFP4, x_blocks=codes, x_scales=scales)
    here = read_model_tensor(list_model_tensors(folder)["x"])
    there = convert_moe_packed_tensors(torch.tensor(codes), torch.tensor(scales))
    assert there.dtype == torch.bfloat16
    np.testing.assert_array_equal(here, there.float().numpy())


def test_fp8_by_blocks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    # Sizes that blocks divide: transformers tells a block's from the scales' alone.
    plain = torch.randn(15, 8, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 4, generator=generator) + 0.1
    there = Fp8Dequantize(None)._dequantize_one(plain, scales, torch.bfloat16)
    codes = plain.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    quantization = FP8 | {"weight_block_size": [5, 2]}
    tensors = {"x": codes, "x_scale_inv": scales.numpy()}
    folder = write_folder(tmp_path, quantization, **tensors)
    here = read_model_tensor(list_model_tensors(folder)["x"])
    np.testing.assert_array_equal(here, there.float().numpy())
