"""Tokenizers of single files: tokenizer.json and SentencePiece models."""

import pytest
from tokenizers import Tokenizer as Library

from maxlm.data.tokenizer.load import import_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from tests.data.tokenizer.foreign import TEXTS, write_checkpoint
from tests.errors import message

TEXT = "".join(TEXTS)


@pytest.mark.parametrize("name", ["bert", "t5", "smollm2", "llama2"])
def test_a_tokenizer_json_alone(name, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", name)
    path = (folder / "tokenizer.json").rename(tmp_path / "any.json")
    library = Library.from_file(str(path))
    named = {"smollm2": "<|im_end|>", "llama2": "</s>"}.get(name)
    if name == "smollm2":
        assert "no token is named to close a document with" in message(
            import_tokenizer, path
        )
    ours = import_tokenizer(path, eos=named)
    expected = {"bert": "[SEP]", "t5": "</s>"}.get(name, named)
    assert ours.eos_id == library.token_to_id(expected)
    assert ours.encode(TEXT) == library.encode(TEXT, add_special_tokens=False).ids
    assert ours.extra_files == {}
    assert "has no token '<absent>'; name one" in message(
        import_tokenizer, path, eos="<absent>"
    )


def test_roles_named_by_hand_go_before_those_of_files(tmp_path):
    folder = write_checkpoint(tmp_path, "llama2")
    ours = import_tokenizer(folder, bos="</s>", eos="<s>", pad="<unk>")
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 1, 0)


def test_a_sentencepiece_model_alone(make_config, texts, tmp_path):
    trained = train_tokenizer(make_config("sentencepiece_bpe"), texts)
    path = tmp_path / "any.model"
    path.write_bytes(trained.codec.data)
    assert "name one of the vocabulary as eos" in message(import_tokenizer, path)
    ours = import_tokenizer(path, eos="<|endoftext|>", pad="<|pad|>")
    assert (ours.eos_id, ours.pad_id, ours.lossless) == (
        trained.eos_id,
        trained.pad_id,
        True,
    )
    assert ours.encode(TEXT) == trained.encode(TEXT)
    path.write_bytes(b"\x0agarbage")
    assert "damaged tokenizer file" in message(import_tokenizer, path)
