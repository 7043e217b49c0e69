"""Tensors of GGUF files: values, and codes as they are."""

import numpy as np
import pytest

from maxlm.huggingface.gguf.reading import open_gguf_model
from maxlm.huggingface.gguf.tensors import GgufTensor
from maxlm.huggingface.gguf.writer import GgufFileWriter, TensorSpec
from tests.huggingface.gguf.files import list_llama_shapes

gguf = pytest.importorskip("gguf")

METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.expert_count": 3,
    "llama.expert_used_count": 2,
    "tokenizer.ggml.model": "none",
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A file in Q8_0, and the fp32 values that it was made of."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    shapes = list_llama_shapes(1, 64, 96, 4, 2, 40, num_experts=3)
    random = np.random.default_rng(1)
    values = {
        name: random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    specs = {
        name: TensorSpec("Q8_0" if len(shape) > 1 else "F32", shape)
        for name, shape in shapes.items()
    }
    writer = GgufFileWriter(path, "llama", METADATA, specs)
    for name, x in values.items():
        writer.write(name, x)
    return path, values


def test_values_are_those_of_gguf_py(quantized):
    """gguf-py's own codec has the same bytes and values."""
    path, values = quantized
    tensors = open_gguf_model(path).tensors
    for stored in gguf.GGUFReader(path).tensors:
        if stored.tensor_type.name != "Q8_0":
            continue
        expected = gguf.quants.quantize(values[stored.name], stored.tensor_type)
        assert np.array_equal(stored.data, expected), stored.name
    ours = tensors["model.layers.0.self_attn.v_proj.weight"].dequantize()
    x = values["blk.0.attn_v.weight"]
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    decoded = gguf.quants.dequantize(gguf.quants.quantize(x, q8_0), q8_0)
    assert np.array_equal(ours, decoded)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.block_sparse_moe.experts.2.w2.weight",
        "lm_head.weight",
    ],
)
def test_codes_are_kept_in_the_order_of_hugging_face(quantized, name):
    path, _ = quantized
    tensor = open_gguf_model(path).tensors[name]
    assert isinstance(tensor, GgufTensor)
    number_format, planes = tensor.read_planes()
    assert number_format.type_name == "Q8_0"
    values = tensor.dequantize()
    assert np.array_equal(np.asarray(number_format.decode(planes)), values)


def test_experts_lie_apart(quantized):
    path, values = quantized
    tensors = open_gguf_model(path).tensors
    for expert in range(3):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
        difference = (
            tensors[name].dequantize() - values["blk.0.ffn_gate_exps.weight"][expert]
        )
        assert np.abs(difference).max() < 0.02
