"""Tensors that are published quantized are read as the numbers that their formats
define."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from maxlm.config import MaxlmError
from maxlm.huggingface.quantized import list_model_tensors, read_model_tensor
from maxlm.run.convert import convert, open_huggingface_model
from tests.models.published import folder_of, golden

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def write_folder(folder: Path, quantization: Any, **tensors: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw_mxfp4(random: np.random.Generator, shape: tuple[int, ...]):
    """Codes and scales of matrices [E, outputs, groups of 32 inputs]."""
    codes = random.integers(0, 256, (*shape, 16), dtype=np.uint8)
    return codes, random.integers(97, 140, shape, dtype=np.uint8)


def decode_e2m1(code: int) -> float:
    """OCP Microscaling v1.0, §5.3.3: a sign, two bits of exponent (bias 1), one of
    mantissa."""
    sign = -1.0 if code & 8 else 1.0
    exponent = code >> 1 & 3
    mantissa = code & 1
    if exponent == 0:
        return sign * mantissa / 2
    return sign * 2.0 ** (exponent - 1) * (1 + mantissa / 2)


def decode_mxfp4(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, inputs, outputs] in float64, one number at a time."""
    num_experts, outputs, groups = scales.shape
    values = np.empty((num_experts, groups * 32, outputs))
    for e, o, g, i in product(*map(range, (num_experts, outputs, groups, 32))):
        byte = int(codes[e, o, g, i // 2])
        code = byte >> 4 if i % 2 else byte & 15
        scale = 2.0 ** (int(scales[e, o, g]) - 127)
        values[e, g * 32 + i, o] = decode_e2m1(code) * scale
    return values


def test_mxfp4_is_read_as_its_numbers_with_inputs_first(tmp_path):
    codes, scales = draw_mxfp4(np.random.default_rng(0), (3, 5, 2))
    folder = write_folder(tmp_path, MXFP4, x_blocks=codes, x_scales=scales)
    (stored,) = list_model_tensors(folder).values()
    assert (stored.name, stored.shape, stored.dtype) == ("x", (3, 64, 5), "BF16")
    values = read_model_tensor(stored)
    np.testing.assert_array_equal(values, decode_mxfp4(codes, scales))
    assert (values == values.astype(ml_dtypes.bfloat16)).all()


def test_a_scale_that_is_no_number_makes_none(tmp_path):
    codes, scales = draw_mxfp4(np.random.default_rng(1), (1, 2, 1))
    scales[0, 1] = 255
    folder = write_folder(tmp_path, MXFP4, x_blocks=codes, x_scales=scales)
    values = read_model_tensor(list_model_tensors(folder)["x"])
    np.testing.assert_array_equal(np.isnan(values[0]).all(0), [False, True])


def test_fp8_blocks_are_scaled_and_cut_off_at_the_edges(tmp_path):
    random = np.random.default_rng(2)
    plain = random.standard_normal((7, 5)).astype(ml_dtypes.float8_e4m3fn)
    scales = random.uniform(0.1, 3, (3, 2)).astype(np.float32)
    other = random.standard_normal(4).astype(np.float32)
    quantization = FP8 | {"weight_block_size": [3, 4]}
    tensors = {"a.weight": plain, "a.weight_scale_inv": scales, "b": other}
    folder = write_folder(tmp_path, quantization, **tensors)
    stored = list_model_tensors(folder)
    assert sorted(stored) == ["a.weight", "b"]
    want = np.empty((7, 5))
    for row, column in product(range(7), range(5)):
        scale = scales[row // 3, column // 4]
        want[row, column] = np.float32(plain[row, column]) * scale
    want = want.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(read_model_tensor(stored["a.weight"]), want)
    np.testing.assert_array_equal(read_model_tensor(stored["b"]), other)


def _fp8(rows: int, columns: int) -> np.ndarray:
    return np.zeros((rows, columns), ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(
    ("quantization", "tensors", "message"),
    [
        (MXFP4, {"x_blocks": np.zeros((1, 2, 3, 16), np.uint8)}, "lack x_scales"),
        (
            MXFP4,
            {
                "x_blocks": np.zeros((1, 2, 3, 16), np.uint8),
                "x_scales": np.zeros((1, 2, 4), np.uint8),
            },
            r"x_blocks is U8 \[1, 2, 3, 16\], its scales are U8 \[1, 2, 4\]",
        ),
        (FP8 | {"weight_block_size": [2, 2]}, {"x": _fp8(3, 2)}, "lack x_scale_inv"),
        (
            FP8 | {"weight_block_size": [2, 2]},
            {"x": _fp8(5, 2), "x_scale_inv": np.zeros((2, 1), np.float32)},
            r"x is F8_E4M3 \[5, 2\], its scales are F32 \[2, 1\]",
        ),
        (FP8, {"x": _fp8(5, 2)}, "weight_block_size=None is not a pair of sizes"),
    ],
)
def test_codes_and_scales_that_do_not_fit_are_refused(
    quantization, tensors, message, tmp_path
):
    folder = write_folder(tmp_path, quantization, **tensors)
    with pytest.raises(MaxlmError, match=message):
        list_model_tensors(folder)


@pytest.mark.more
def test_a_model_in_fp8_comes_back_as_bf16(tmp_path):
    """Matrices in FP8, norms and biases plain, and a layer behind the last."""
    random = np.random.default_rng(3)
    case = golden("deepseek_v3")
    tensors: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    for name, value in case.tensors.items():
        expected[name] = value
        if "_proj" not in name:
            tensors[name] = value
            continue
        codes = value.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        blocks = tuple(-(-size // 4) for size in value.shape)
        scales = random.uniform(0.5, 2, blocks).astype(np.float32)
        spread = np.repeat(np.repeat(scales, 4, 0), 4, 1)
        spread = spread[: value.shape[0], : value.shape[1]]
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        product_ = codes.astype(np.float32) * spread
        expected[name] = product_.astype(ml_dtypes.bfloat16)
    tensors["model.layers.3.eh_proj.weight"] = np.ones((2, 2), ml_dtypes.bfloat16)
    quantization = FP8 | {"weight_block_size": [4, 4]}
    folder = folder_of(
        "deepseek_v3", tmp_path / "fp8", tensors, quantization_config=quantization
    )
    result = convert(folder, tmp_path / "run")
    notes = [note for note in result.notes if "tokenizer" not in note]
    assert notes == [
        "weights in fp8 are read as bf16",
        "left out: model.layers.3 (1 tensors), which predicts further tokens",
    ]
    convert(tmp_path / "run", tmp_path / "back")
    back = list_model_tensors(tmp_path / "back")
    assert back.keys() == expected.keys()
    for name, value in expected.items():
        assert back[name].dtype == ("F32" if value.dtype == np.float32 else "BF16")
        got = read_model_tensor(back[name])
        np.testing.assert_array_equal(got, value.astype(np.float32))


def test_another_method_is_refused(tmp_path):
    values = {"quant_method": "awq", "bits": 4}
    folder = folder_of("llama", tmp_path / "awq", quantization_config=values)
    with pytest.raises(MaxlmError, match="quant_method='awq' is not implemented"):
        open_huggingface_model(folder, tmp_path / "run")
