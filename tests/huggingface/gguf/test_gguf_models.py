"""GGUF files: what is written is read again as the same model, bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from maxlm.huggingface.gguf.container import read_gguf
from maxlm.huggingface.gguf.reading import open_gguf_model
from maxlm.huggingface.gguf.tensors import place_tensor
from maxlm.huggingface.gguf.writer import GgufFileWriter, TensorSpec
from maxlm.run.convert import convert, open_huggingface_model
from maxlm.run.load import _MemoryWriter
from tests.errors import message
from tests.huggingface.gguf.files import MODELS, split_latent_maps, write_model

gguf = pytest.importorskip("gguf")

QUICK = ("llama", "mixtral", "gpt2", "falcon_40b")


def read_parameters(path: Path):
    opened = open_huggingface_model(path, Path("runs/x"))
    writer = _MemoryWriter()
    opened.import_tensors(writer)
    return opened.config.model, writer.arrays


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(
            pytest.param(name, marks=pytest.mark.more)
            for name in MODELS
            if name not in QUICK
        ),
    ],
)
def test_a_model_comes_back(name, tmp_path):
    """Settings and parameters of a file are those of the folder that it was made of:
    rows in their order, experts apart, norms without the one, maps turned."""
    path = write_model(name, tmp_path)
    model, arrays = read_parameters(path)
    expected_model, expected_arrays = read_parameters(tmp_path / "hf")
    assert arrays.keys() == expected_arrays.keys()
    for key, expected in expected_arrays.items():
        assert np.array_equal(arrays[key], expected), key
    settings = model.model_dump()
    expected_settings = expected_model.model_dump()
    # GGUF has no word for it.
    settings.pop("init_std")
    expected_settings.pop("init_std")
    assert settings == expected_settings


def test_llama_cpp_has_the_rows_of_its_own_rotary_order(tmp_path):
    """Row 2j of a head of queries is row j of Hugging Face's, row 2j + 1 its partner
    half a head away (llama.cpp's ``permute``)."""
    path = write_model("llama", tmp_path)
    reader = gguf.GGUFReader(path)
    (stored,) = (x for x in reader.tensors if x.name == "blk.1.attn_k.weight")
    _, arrays = read_parameters(tmp_path / "hf")
    ours = arrays["layers.attention.key.kernel"][1]  # [D, K, H]
    width, num_heads, head_dim = ours.shape
    rows = ours.reshape(width, num_heads, 2, head_dim // 2)
    expected = rows.transpose(1, 3, 2, 0).reshape(num_heads * head_dim, width)
    assert np.array_equal(stored.data, expected)


def test_latent_maps_in_two_parts_are_joined(tmp_path):
    path = write_model("deepseek_v2", tmp_path)
    split_latent_maps(path, tmp_path / "split.gguf")
    model, arrays = read_parameters(tmp_path / "split.gguf")
    expected_model, expected_arrays = read_parameters(path)
    assert model == expected_model
    for key, expected in expected_arrays.items():
        assert np.array_equal(arrays[key], expected), key


def test_a_model_in_several_files(tmp_path):
    """Of files as llama.cpp splits them the first is named; each has its own tensors."""
    path = write_model("llama", tmp_path)
    file = read_gguf(path)
    names = [*file.tensors]
    for number, part in enumerate((names[:9], names[9:]), 1):
        metadata = {"split.count": 2, "split.no": number - 1}
        if number == 1:
            metadata |= file.metadata
            del metadata["general.architecture"], metadata["general.alignment"]
        specs = {name: TensorSpec("F32", file.tensors[name].shape) for name in part}
        target = tmp_path / f"split-{number:05}-of-00002.gguf"
        writer = GgufFileWriter(target, "llama", metadata, specs)
        for name in part:
            writer.write(name, place_tensor(file.tensors[name], name).dequantize())
    _, arrays = read_parameters(tmp_path / "split-00001-of-00002.gguf")
    _, expected_arrays = read_parameters(path)
    for key, expected in expected_arrays.items():
        assert np.array_equal(arrays[key], expected), key
    (tmp_path / "split-00002-of-00002.gguf").unlink()
    text = message(open_gguf_model, tmp_path / "split-00001-of-00002.gguf")
    assert "split-00002-of-00002.gguf: cannot be read (No such file" in text


def test_other_readers_see_metadata_and_tensors(tmp_path):
    path = write_model("qwen3_moe", tmp_path, "f16")
    reader = gguf.GGUFReader(path)
    contents = {key: field.contents() for key, field in reader.fields.items()}
    assert contents["general.architecture"] == "qwen3moe"
    assert contents["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    types = {x.name: x.tensor_type.name for x in reader.tensors}
    assert types["blk.0.ffn_down_exps.weight"] == "F16"
    assert types["blk.0.ffn_gate_inp.weight"] == types["output_norm.weight"] == "F32"


def test_a_file_of_a_run_needs_a_new_name_and_a_known_type(tmp_path):
    path = write_model("llama", tmp_path)
    run = tmp_path / "run"
    assert "this file exists" in message(convert, run, path)
    other = tmp_path / "made" / "other.gguf"
    text = message(convert, run, other, quantization="q4_kk_m")
    assert text.startswith("--quantization q4_kk_m: no such type of GGUF files")
    assert text.endswith("did you mean q4_k_m?")
    text = message(convert, run, tmp_path / "folder", quantization="q8_0")
    assert "name a target that ends in .gguf" in text
    text = message(convert, path, other)
    assert "make it a run first" in text
    assert not other.parent.exists()


@pytest.mark.heavy
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path):
    source = tmp_path / "model.gguf"
    text = message(write_model, "llama_dynamic", tmp_path / "dynamic")
    assert "GGUF has no word for rope_scaling.rope_type=dynamic" in text
    text = message(write_model, "gpt2_narrow", tmp_path / "narrow")
    assert "has no word for activation_function='gelu'" in text
    text = message(write_model, "mamba", tmp_path / "mamba")
    assert "MambaForCausalLM cannot be written as GGUF" in text
    assert not source.exists()
    assert not [*tmp_path.rglob("*.gguf"), *tmp_path.rglob(".model.gguf*")]
