"""Saving and loading, and folders that are not what they should be."""

import json
import pickle

import pytest

from maxlm.data.tokenizer.files import has_tokenizer_files
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from tests.errors import message

TEXT = "the quick <|user|> größer\n\u2581\t 12 猫"


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "t")
    return tmp_path / "new" / "t"


def model_file(folder):
    (path,) = folder.glob("tokenizer.*")
    return path


def test_a_loaded_tokenizer_is_the_saved_one(tokenizer, folder, tmp_path):
    loaded = load_tokenizer(str(folder))
    for role in ("special_tokens", "vocab_size", "bos_id", "eos_id", "pad_id"):
        assert getattr(loaded, role) == getattr(tokenizer, role)
    for copy in (loaded, pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(TEXT) == tokenizer.encode(TEXT)
    assert sorted(
        path.name for path in folder.parent.rglob("*") if path.is_file()
    ) == sorted(["maxlm_tokenizer.json", tokenizer.codec.file_name])
    loaded.save(tmp_path / "again")
    for path in folder.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_saving_over_another_kind_leaves_nothing_of_it(
    tokenizer, make_config, texts, folder
):
    other = train_tokenizer(make_config("bpe", vocab_size=300), texts)
    other.save(folder)
    assert load_tokenizer(folder).fingerprint == other.fingerprint
    assert {path.name for path in folder.iterdir()} == {
        "maxlm_tokenizer.json",
        "tokenizer.json",
    }


def test_fingerprint_tells_roles_and_vocabularies_apart(make_config, texts):
    kinds = ["bpe", "sentencepiece_bpe", "sentencepiece_unigram"]
    changes = [{}, {"vocab_size": 601}, {"pad": None}, {"eos": "<|user|>"}]
    configs = [make_config(kind, **change) for kind in kinds for change in changes]
    fingerprints = {train_tokenizer(config, texts).fingerprint for config in configs}
    assert len(fingerprints) == len(configs)
    assert all(len(fingerprint) == 64 for fingerprint in fingerprints)


def test_what_is_no_folder_of_a_tokenizer(folder, tmp_path):
    assert has_tokenizer_files(folder)
    assert not has_tokenizer_files(tmp_path)
    (tmp_path / "file").write_text("")
    for name, fault in (("missing", "no such folder"), ("file", "not a folder")):
        assert f"{tmp_path / name}: {fault}; name" in message(
            load_tokenizer, tmp_path / name
        )


def test_missing_files(folder):
    for path in (model_file(folder), folder / "maxlm_tokenizer.json"):
        path.unlink()
        assert f"{path}: no such file; name a folder" in message(load_tokenizer, folder)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            "{",
            "damaged tokenizer file (Invalid JSON: EOF while parsing an object at line "
            "1",
        ),
        ({"kind": "morphemes"}, "damaged tokenizer file (kind: Input should be 'bpe',"),
        (
            {"format": 7},
            "tokenizer format 7 is not 1; read it with the version of maxlm that",
        ),
        (
            {"carried": ["../config.json"]},
            "damaged tokenizer file (carried: ../config.json)",
        ),
    ],
)
def test_corrupt_metadata(folder, content, fault):
    path = folder / "maxlm_tokenizer.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    assert message(load_tokenizer, folder).startswith(f"{path}: {fault}")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00garbage"])
def test_corrupt_model(folder, content):
    path = model_file(folder)
    path.write_bytes(content)
    assert f"{path}: damaged tokenizer file (" in message(load_tokenizer, folder)


def test_model_of_another_tokenizer(folder, make_config, texts, tmp_path):
    kind = load_tokenizer(folder).kind
    train_tokenizer(make_config(kind, vocab_size=590), texts).save(tmp_path / "other")
    path = model_file(folder)
    path.write_bytes(model_file(tmp_path / "other").read_bytes())
    assert "maxlm_tokenizer.json do not belong together" in message(
        load_tokenizer, folder
    )


def test_unwritable_folder(tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "t"):
        assert message(tokenizer.save, path).startswith(f"{path}: cannot write: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
