"""tiktoken's rank files, against tiktoken on ranks that are trained here."""

import base64
import hashlib

import pytest
import tiktoken
from tokenizers import Tokenizer as Library

from maxlm.cli.main import main
from maxlm.data.tokenizer import rank_files
from maxlm.data.tokenizer.load import export_tokenizer, import_tokenizer, load_tokenizer
from maxlm.data.tokenizer.rank_files import PATTERNS
from maxlm.data.tokenizer.train import train_tokenizer
from tests.data.tokenizer.foreign import TEXTS
from tests.data.tokenizer.references import fuzz_texts, long_texts
from tests.errors import message

TEXT = "".join(TEXTS)


@pytest.fixture(scope="module")
def ranks(make_config, texts):
    """Bytes first, then what was learned, and one token that no two others make."""
    learned = train_tokenizer(make_config("bpe", vocab_size=500), texts)
    count = learned.vocab_size - len(learned.special_tokens)
    ranks = {
        token: rank for rank, token in enumerate(learned.codec.token_bytes[:count])
    }
    assert b"quick" not in ranks
    return ranks | {b"quick": len(ranks)}


@pytest.fixture
def rank_file(ranks, tmp_path):
    path = tmp_path / "tokenizer.model"  # Llama 3's name for it.
    lines = [
        b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items()
    ]
    path.write_bytes(b"".join(lines))
    return path


def open_reference(ranks, pattern, special=None):
    return tiktoken.Encoding(
        "reference",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens=special or {},
    )


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\p{L}+|\p{N}|[^\p{L}\p{N}]"])
def test_ids_are_tiktokens(ranks, rank_file, tmp_path, pattern):
    ours = import_tokenizer(rank_file, pattern=pattern, eos="<|end|>")
    reference = open_reference(ranks, PATTERNS.get(pattern, pattern))
    texts = ["quick", " quickly", TEXT, *fuzz_texts(60, 7), *long_texts(2_000)]
    assert ours.encode_batch(texts) == [
        reference.encode_ordinary(text) for text in texts
    ]
    assert ours.special_tokens == {"<|end|>": len(ranks)}
    assert (ours.eos_id, ours.prefix_ids, ours.lossless) == (len(ranks), (), True)
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    export_tokenizer(ours, tmp_path / "out")
    library = Library.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert library.encode(TEXT).ids == reference.encode_ordinary(TEXT)


def test_special_tokens_have_their_ids_and_a_gap_before_them(
    ranks, rank_file, tmp_path, capfd
):
    """As of the folder of a Llama 3 checkpoint, whose only tokenizer is such a file."""
    count = len(ranks)
    special = {"<|begin|>": count + 20, "<|a=b|>": count + 30, "<|end|>": count + 31}
    options = [f"--special=<|begin|>={count + 20}", f"--special=<|a=b|>={count + 30}"]
    out = tmp_path / "out"
    take = [
        "tokenizer",
        "import",
        str(rank_file.parent),
        "--pattern",
        "cl100k_base",
        *options,
    ]
    assert main([*take, "--bos=<|begin|>", "--eos=<|end|>", "--out", str(out)]) == 0
    assert capfd.readouterr().out.startswith(f"{out}: {count + 32} tokens, lossless,")
    ours = load_tokenizer(out)
    reference = open_reference(ranks, PATTERNS["cl100k_base"], special)
    assert (ours.bos_id, ours.eos_id) == (count + 20, count + 31)
    assert ours.special_tokens == special
    for text in ("<|begin|>the quick<|a=b|>", "a<|end|>", *TEXTS):
        allowed = ours.encode(text, allow_special=True)
        assert allowed == reference.encode(text, allowed_special="all")
        assert ours.encode(text) == reference.encode_ordinary(text)
        assert ours.decode(allowed) == text


@pytest.mark.heavy
def test_a_published_file_is_known_by_its_content(ranks, rank_file, monkeypatch):
    """The ids of its special tokens are tiktoken's own; others may come beside them."""
    digest = hashlib.sha256(rank_file.read_bytes()).hexdigest()
    monkeypatch.setitem(rank_files._PUBLISHED, digest, "o200k_base")
    ours = import_tokenizer(rank_file)
    assert ours.special_tokens == {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}
    assert (ours.eos_id, ours.vocab_size) == (199999, 200019)
    reference = open_reference(ranks, PATTERNS["o200k_base"])
    assert ours.encode(TEXT) == reference.encode_ordinary(TEXT)
    more = import_tokenizer(
        rank_file, special_tokens={"<|x|>": None, "<|endoftext|>": None}
    )
    assert more.special_tokens == {**ours.special_tokens, "<|x|>": 200019}


def test_the_published_encodings_special_tokens_are_tiktokens(monkeypatch):
    """Their ranks are downloaded, all else is in the package."""
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    for name, special in rank_files._PUBLISHED_SPECIAL_TOKENS.items():
        encoding = getattr(openai_public, name)()
        assert encoding["special_tokens"] == special


def test_files_that_do_not_do(rank_file, tmp_path):
    names = "gpt2, cl100k_base, o200k_base, qwen2, tekken"
    error_text = message(import_tokenizer, rank_file)
    assert error_text.endswith(f"`maxlm tokenizer import`): {names}, or give a regex")
    error_text = message(import_tokenizer, rank_file, pattern="gpt9")
    assert (
        error_text
        == f"{rank_file}: no pattern is called 'gpt9'; use {names}, or give a regex"
    )
    assert "the pattern is no regular expression (" in message(
        import_tokenizer, rank_file, pattern="(unclosed"
    )
    error_text = message(import_tokenizer, rank_file, pattern="gpt2", eos="quick")
    assert (
        "'quick' is an ordinary token of this file; name another literal" in error_text
    )
    error_text = message(
        import_tokenizer, rank_file, pattern="gpt2", special_tokens={"<|x|>": 7}
    )
    assert "the id 7 of '<|x|>' is that of " in error_text
    good = rank_file.read_bytes()
    _, rest = good.split(b"\n", 1)
    for damage in (rest, good + b"!!! 7\n", good + b"YQ==\n", good + b"YQ== 9999\n"):
        rank_file.write_bytes(damage)
        assert ": damaged rank file (" in message(
            import_tokenizer, rank_file, pattern="gpt2"
        )
    other = tmp_path / "tokenizer.json"
    other.write_text("{}")
    assert "leave the pattern and special tokens out" in message(
        import_tokenizer, other, pattern="gpt2"
    )
