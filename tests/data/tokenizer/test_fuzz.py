"""Ids against the reference libraries' own on random texts; MAXLM_FUZZ=10000 gives more
of them."""

import os

import pytest
from tokenizers import Tokenizer as Library

from maxlm.data.tokenizer.load import import_tokenizer
from tests.data.tokenizer.foreign import MAKERS, TEXTS, write_checkpoint
from tests.data.tokenizer.references import fuzz_texts, long_texts

COUNT = int(os.environ.get("MAXLM_FUZZ", "200"))


@pytest.mark.heavy
@pytest.mark.parametrize("name", MAKERS)
def test_hugging_face(name, tmp_path):
    folder = write_checkpoint(tmp_path, name)
    library = Library.from_file(str(folder / "tokenizer.json"))
    ours = import_tokenizer(folder)
    literals = ours.special.ids
    texts = [*fuzz_texts(COUNT, 2), *long_texts(20_000)]
    texts = [text for text in texts if not any(literal in text for literal in literals)]
    library_ids = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert ours.encode_batch(texts) == library_ids


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 200},
        {"model_type": "bpe", "vocab_size": 380, "byte_fallback": True},
        {"model_type": "unigram", "vocab_size": 330, "byte_fallback": True,
         "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
         "user_defined_symbols": ["<tool>", "fox hole"]},
    ],
)  # fmt: skip
def test_sentencepiece(tmp_path, options):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).split("\n") * 3),
        model_prefix=str(tmp_path / "any"),
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    path = tmp_path / "any.model"
    library = SentencePieceProcessor(model_file=str(path))
    ours = import_tokenizer(path)
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    texts = [*fuzz_texts(COUNT, 4), *long_texts(20_000), "fox hole<tool>", "  a  b  "]
    library_ids = library.encode(texts)
    assert ours.encode_batch(texts) == library_ids
    if not options.get(
        "byte_fallback"
    ):  # The library shows U+FFFD for a whole run of bytes.
        assert [ours.decode(ids) for ids in library_ids] == library.decode(library_ids)
    ours.save(tmp_path / "kept")
    assert (
        import_tokenizer(tmp_path / "kept" / "tokenizer.model").encode_batch(texts)
        == library_ids
    )
