"""A published tokenizer may have special tokens that its model's table has no rows for.
Then they are plain text, in every process, and its files stay as they are."""

import json
import pickle

import pytest

from maxlm.data.tokenizer.load import export_tokenizer, import_tokenizer, load_tokenizer
from tests.models import tiny_tokenizers as tiny

ROWS = 120
TEXT = "a <image> b<eos>"


@pytest.fixture(params=[False, True])
def folder(request, tmp_path):
    source = tmp_path / "source"
    tokenizer = tiny.images(ROWS, known=request.param)
    tiny.save(tokenizer, source, bos_token="<bos>", eos_token="<eos>")
    return source


def test_special_tokens_past_the_table_are_plain_text(folder):
    assert import_tokenizer(folder).special_tokens["<image>"] == ROWS
    tokenizer = import_tokenizer(folder, num_embedding_rows=ROWS)
    assert tokenizer.vocab_size == ROWS
    assert set(tokenizer.special_tokens) == {"<bos>", "<eos>"}
    for allow in (False, True):
        ids = tokenizer.encode(TEXT, allow_special=allow)
        assert max(ids) < ROWS
        assert tokenizer.decode(ids) == TEXT
        assert (tokenizer.eos_id in ids) == allow


def test_so_it_stays_when_saved_and_sent(folder, tmp_path):
    tokenizer = import_tokenizer(folder, num_embedding_rows=ROWS)
    tokenizer.save(tmp_path / "saved")
    for again in (
        load_tokenizer(tmp_path / "saved"),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again.vocab_size == ROWS
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXT, allow_special=True) == tokenizer.encode(
            TEXT, allow_special=True
        )
    assert tokenizer.fingerprint != import_tokenizer(folder).fingerprint
    export_tokenizer(load_tokenizer(tmp_path / "saved"), tmp_path / "out")
    for path in folder.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_text_can_have_stays(folder):
    """A token that is not special is looked for in any text, and what closes documents
    is put behind each: neither can be left out."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    for token in values["added_tokens"]:
        token["special"] = token["content"] != "<image>"
    path.write_text(json.dumps(values))
    assert import_tokenizer(folder, num_embedding_rows=ROWS).vocab_size == ROWS + 1
    tiny.save(tiny.images(ROWS), folder, bos_token="<bos>", eos_token="<image>")
    assert import_tokenizer(folder, num_embedding_rows=ROWS).eos_id == ROWS
    tiny.save(tiny.images(ROWS), folder, eos_token="<eos>", pad_token="<image>")
    assert import_tokenizer(folder, num_embedding_rows=ROWS).pad_id is None


def test_all_have_rows(folder):
    for rows in (None, ROWS + 1, 10**6):
        tokenizer = import_tokenizer(folder, num_embedding_rows=rows)
        assert tokenizer.vocab_size == ROWS + 1
        assert tokenizer.fingerprint == import_tokenizer(folder).fingerprint
