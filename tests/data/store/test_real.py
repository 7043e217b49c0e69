"""The builder in worker processes, with a real tokenizer; and the corpus command."""

import json
import random

import pytest

from maxlm.cli.main import main
from maxlm.data.documents.config import SourceConfig
from maxlm.data.documents.document import is_heldout
from maxlm.data.store.build import build_store
from maxlm.data.store.store import TokenStore
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def texts():
    words = [
        f"{a}{b}"
        for a in ("foo", "bar", "naïve ", "qu")
        for b in ("x", "yz", "é\n", " 7")
    ]
    pick = random.Random(0)
    return ["".join(pick.choices(words, k=pick.randrange(1, 400))) for _ in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, texts):
    """tokenizer/ and corpus.jsonl."""
    root = tmp_path_factory.mktemp("real")
    train_tokenizer(TokenizerConfig(vocab_size=300), texts).save(root / "tokenizer")
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (root / "corpus.jsonl").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def reference(folder):
    """The store as one process makes it."""
    source = SourceConfig(documents=(str(folder / "corpus.jsonl"),))
    build_store(source, folder / "tokenizer", folder / "store", workers=1)
    return folder / "store"


@pytest.mark.parametrize(("name", "opens"), [("smollm2", False), ("llama2", True)])
def test_documents_open_as_an_imported_tokenizer_says(
    tmp_path, folder, texts, capfd, name, opens
):
    from maxlm.data.tokenizer.load import import_tokenizer
    from tests.data.tokenizer.foreign import write_checkpoint

    tokenizer = import_tokenizer(write_checkpoint(tmp_path / name, name))
    tokenizer.save(tmp_path / "tokenizer")
    source = SourceConfig(documents=(str(folder / "corpus.jsonl"),))
    manifest = build_store(
        source, tmp_path / "tokenizer", tmp_path / "store", workers=1
    )
    store = TokenStore.open(tmp_path / "store")
    assert manifest.bos_id == (tokenizer.bos_id if opens else None)
    for index in range(0, len(texts), 50):
        ids = tokenizer.encode(texts[index])
        assert store.text_tokens(index).tolist() == ids
        assert store.document(index).tolist() == [
            *tokenizer.prefix_ids,
            *ids,
            tokenizer.eos_id,
        ]
        assert main(["corpus", "show", str(store.path), str(index)]) == 0
        assert capfd.readouterr().out == texts[index]
    store.verify()
    assert load_tokenizer(store.tokenizer_folder).prefix_ids == tokenizer.prefix_ids


def test_number_of_workers_does_not_change_the_store(
    tmp_path, reference, folder, folder_bytes, set_part_bytes
):
    set_part_bytes(5000)
    source = SourceConfig(documents=(str(folder / "corpus.jsonl"),))
    stages = []
    out = tmp_path / "store"
    options = {"workers": 3, "progress": lambda *stage: stages.append(stage)}
    build_store(source, folder / "tokenizer", out, **options)
    assert folder_bytes(out) == folder_bytes(reference)
    size = (folder / "corpus.jsonl").stat().st_size
    assert [stage for stage in stages if stage[0] == "tokenizing"][-1] == (
        "tokenizing",
        size,
        size,
    )
    tokens = TokenStore.open(reference).num_tokens
    assert stages[-1] == ("writing tokens", tokens, tokens)


def run(capsysbinary, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsysbinary.readouterr()
    return code, out.decode(), err.decode()


def test_commands(tmp_path, capsysbinary, folder, texts):
    out = tmp_path / "store"
    arguments = [
        "corpus",
        "build",
        folder / "corpus.jsonl",
        "--tokenizer",
        folder / "tokenizer",
    ]
    arguments += [
        "--out",
        out,
        "--workers",
        1,
        "--split",
        "heldout",
        "--heldout-fraction",
    ]
    code, printed, err = run(capsysbinary, *arguments, 0.2)
    assert code == 0, err
    heldout_texts = [text for text in texts if is_heldout(text, 0.2)]
    assert "heldout (0.2 of documents held out)" in printed
    assert "tokenizing: " in err
    code, _, err = run(capsysbinary, *arguments, 0.3)
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "from other inputs: heldout_fraction was 0.2, now 0.3; choose another folder"
        in err
    )
    about = json.loads(run(capsysbinary, "corpus", "info", out, "--json")[1])
    assert about["num_documents"] == len(heldout_texts)
    assert about["text_bytes"] == sum(len(text.encode()) for text in heldout_texts)
    assert about["bytes_per_token"] == about["text_bytes"] / about["num_tokens"]
    code, printed, _ = run(capsysbinary, "corpus", "verify", out)
    assert code == 0
    assert (
        f"{len(heldout_texts):,} documents, {about['num_tokens']:,} tokens" in printed
    )
    assert run(capsysbinary, "corpus", "show", out, 5) == (0, heldout_texts[5], "")
    _, printed, _ = run(capsysbinary, "corpus", "show", out, 5, "--tokens")
    assert [int(i) for i in printed.split()] == TokenStore.open(out).document(
        5
    ).tolist()
    code, _, err = run(capsysbinary, "corpus", "show", out, 300)
    assert code == 2
    assert err.startswith(
        f"error: {out}: there is no document 300; the store has {len(heldout_texts)}; "
    )
    assert run(capsysbinary, *arguments, 0.3, "--force")[0] == 0
    assert TokenStore.open(out).manifest.heldout_fraction == 0.3
