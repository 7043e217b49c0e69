"""The builder in worker processes, with a real tokenizer; and the corpus command."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from maxlm.cli.main import main
from maxlm.data.documents import SourceConfig, is_heldout
from maxlm.data.store import TokenStore, build_store
from maxlm.data.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def texts():
    words = [f"{a}{b}" for a in ("foo", "bar", "naïve ", "qu") for b in ("x", "yz", "é\n", " 7")]
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


def test_documents_come_back_exactly(reference, folder, texts):
    store, tokenizer = TokenStore.open(reference), load_tokenizer(folder / "tokenizer")
    assert store.num_documents == len(texts)
    for index in range(0, len(texts), 7):
        bos, *ids, eos = store.document(index).tolist()
        assert (bos, eos) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode_bytes(ids).decode() == texts[index]
    store.verify()
    assert load_tokenizer(store.tokenizer_folder).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(("name", "opens"), [("smollm2", False), ("llama2", True)])
def test_documents_open_as_an_imported_tokenizer_says(tmp_path, folder, texts, capfd, name, opens):
    from maxlm.data.tokenizer import import_tokenizer
    from tests.data.tokenizer.foreign import write_checkpoint

    tokenizer = import_tokenizer(write_checkpoint(tmp_path / name, name))
    tokenizer.save(tmp_path / "tokenizer")
    source = SourceConfig(documents=(str(folder / "corpus.jsonl"),))
    manifest = build_store(source, tmp_path / "tokenizer", tmp_path / "store", workers=1)
    store = TokenStore.open(tmp_path / "store")
    assert manifest.bos_id == (tokenizer.bos_id if opens else None)
    for index in range(0, len(texts), 50):
        ids = tokenizer.encode(texts[index])
        assert store.text_tokens(index).tolist() == ids
        assert store.document(index).tolist() == [*tokenizer.opening, *ids, tokenizer.eos_id]
        assert main(["corpus", "show", str(store.path), str(index)]) == 0
        assert capfd.readouterr().out == texts[index]
    store.verify()
    assert load_tokenizer(store.tokenizer_folder).opening == tokenizer.opening


def test_number_of_workers_does_not_change_the_store(tmp_path, reference, folder, folder_bytes):
    source = SourceConfig(documents=(str(folder / "corpus.jsonl"),))
    stages = []
    build_store(
        source,
        folder / "tokenizer",
        tmp_path / "store",
        workers=3,
        shard_bytes=5000,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert folder_bytes(tmp_path / "store") == folder_bytes(reference)
    size = (folder / "corpus.jsonl").stat().st_size
    assert [stage for stage in stages if stage[0] == "tokenizing"][-1] == ("tokenizing", size, size)
    tokens = TokenStore.open(reference).num_tokens
    assert stages[-1] == ("writing tokens", tokens, tokens)


def test_killed_builds_end_the_same(tmp_path, reference, folder, folder_bytes):
    """SIGKILL as soon as so many parts are finished, again and again, then let it end."""
    command = [sys.executable, "-m", "maxlm.cli.main", "corpus", "build", "--workers", "2"]
    command += [str(folder / "corpus.jsonl"), "--tokenizer", str(folder / "tokenizer")]
    command += ["--out", str(tmp_path / "store")]
    # The default part size makes this corpus one part.
    starter = "import maxlm.data.store.plan as b, maxlm.cli.main as m, sys\n"
    starter += "if __name__ == '__main__':\n    b._MIN_SHARD_BYTES = 2000\n    m.main(sys.argv[1:])"
    command[1:3] = ["-c", starter]
    parts = tmp_path / ".store.building" / "parts"
    for finished in (1, 5):
        build = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while len(list(parts.glob("*.json"))) < finished and build.poll() is None:
            time.sleep(0.002)
        os.kill(build.pid, signal.SIGKILL)
        build.communicate()
        assert build.returncode == -signal.SIGKILL
        assert not (tmp_path / "store").exists()
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert folder_bytes(tmp_path / "store") == folder_bytes(reference)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def run(capsysbinary, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    out, err = capsysbinary.readouterr()
    return code, out.decode(), err.decode()


def test_build_command(tmp_path, capsysbinary, folder, texts):
    arguments = ["corpus", "build", folder / "corpus.jsonl", "--tokenizer", folder / "tokenizer"]
    arguments += ["--out", tmp_path / "store", "--workers", 1, "--split", "heldout"]
    arguments += ["--heldout-fraction", 0.2]
    code, out, err = run(capsysbinary, *arguments)
    assert code == 0, err
    count = sum(is_heldout(text, 0.2) for text in texts)
    assert TokenStore.open(tmp_path / "store").num_documents == count
    assert "heldout (0.2 of documents held out)" in out
    assert "tokenizing: " in err
    code, out, err = run(capsysbinary, *arguments[:-2], "--heldout-fraction", 0.3)
    assert code == 2
    assert err == (
        f"error: {tmp_path}/store: the store here was built from other inputs: heldout_fraction "
        "was 0.2, now 0.3; choose another folder, or replace the store with --force (force=True)\n"
    )
    assert run(capsysbinary, *arguments[:-2], "--heldout-fraction", 0.3, "--force")[0] == 0
    assert TokenStore.open(tmp_path / "store").manifest.heldout_fraction == 0.3


def test_info_command(capsysbinary, reference, texts):
    code, out, _ = run(capsysbinary, "corpus", "info", reference, "--json")
    about = json.loads(out)
    assert code == 0
    code, out, _ = run(capsysbinary, "corpus", "verify", reference)
    assert code == 0
    assert f"{about['num_documents']:,} documents, {about['num_tokens']:,} tokens" in out
    assert about["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert about["bytes_per_token"] == about["text_bytes"] / about["num_tokens"]
    code, out, _ = run(capsysbinary, "corpus", "info", reference)
    assert code == 0
    assert f"{about['num_tokens']:,} (uint16)" in out


def test_show_command(capsysbinary, reference, texts):
    assert run(capsysbinary, "corpus", "show", reference, 5) == (0, texts[5], "")
    code, out, _ = run(capsysbinary, "corpus", "show", reference, 5, "--tokens")
    assert [int(i) for i in out.split()] == TokenStore.open(reference).document(5).tolist()
    code, _, err = run(capsysbinary, "corpus", "show", reference, 300)
    assert code == 2
    assert err == (
        f"error: {reference}: there is no document 300; the store has 300; choose 0 to 299\n"
    )


def test_corpus_command_and_builder_stay_light():
    script = (
        "import sys, maxlm.cli.corpus\n"
        "assert not {'jax', 'numpy', 'pydantic', 'tokenizers', 'tensorstore'} & set(sys.modules)\n"
        "import maxlm.corpus, maxlm.data.store\n"
        "assert not {'jax', 'flax', 'grain'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
