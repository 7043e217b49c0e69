"""Which tensor gets which number format."""

from math import prod

import pytest

from maxlm.huggingface.gguf.container import count_tensor_bytes
from maxlm.huggingface.gguf.file_types import (
    ModelShape,
    choose_tensor_types,
    parse_file_type,
)
from tests.errors import message
from tests.huggingface.gguf.files import list_llama_shapes

pytest.importorskip("gguf")

LLAMA_8B = {
    **list_llama_shapes(32, 4096, 14_336, 32, 8, 128_256),
    "rope_freqs.weight": (64,),
}
# tools/quantize/README.md of github.com/ggml-org/llama.cpp.
PUBLISHED_BITS = {
    "q2_k": 3.1593,
    "q3_k_s": 3.6429,
    "q3_k_l": 4.2979,
    "iq4_nl": 4.6818,
    "q4_k_s": 4.6672,
    "q4_k_m": 4.8944,
    "q5_k_s": 5.5704,
    "q5_k_m": 5.7036,
    "q6_k": 6.5633,
    "q8_0": 8.5008,
    "f16": 16.0005,
}


@pytest.mark.parametrize("quantization", PUBLISHED_BITS)
def test_llama_8b_has_its_published_bits(quantization):
    model = ModelShape("llama", 32, 32, 8, 0)
    types = choose_tensor_types(parse_file_type(quantization), LLAMA_8B, model)
    num_bytes = sum(
        count_tensor_bytes(types[name], shape) for name, shape in LLAMA_8B.items()
    )
    num_values = sum(map(prod, LLAMA_8B.values()))
    bits = 8 * num_bytes / num_values
    assert bits == pytest.approx(PUBLISHED_BITS[quantization], abs=5e-5)


def test_rows_of_no_whole_blocks_have_another_format():
    shapes = list_llama_shapes(8, 160, 288, 5, 1, 64)
    types = choose_tensor_types("Q4_K_M", shapes, ModelShape("llama", 8, 5, 1, 0))
    assert types["blk.1.attn_q.weight"] == "Q5_0"
    assert types["blk.0.attn_v.weight"] == "Q8_0"  # Q6_K elsewhere
    shapes = list_llama_shapes(1, 60, 70, 5, 1, 64)
    types = choose_tensor_types("Q4_0", shapes, ModelShape("llama", 1, 5, 1, 0))
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_norm.weight"] == "F32"


def test_names_of_file_types():
    assert parse_file_type("q4_k_m") == parse_file_type("Q4_K") == "Q4_K_M"
    assert "did you mean q8_0?" in message(parse_file_type, "q8")
    assert "use one of f32, f16" in message(parse_file_type, "banana")
