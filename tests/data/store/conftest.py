"""A tokenizer double: one token a byte, ids known without any tokenizer library."""

import hashlib
import json
from pathlib import Path

import pytest

from maxlm.data.documents.config import SourceConfig
from maxlm.data.store import arrays
from maxlm.data.store.build import append_store, build_store

TEXTS = [[f"{part} {i} " + "xyz" * (i * 7 % 23) for i in range(40)] for part in "abc"]


class ByteTokenizer:
    """id = byte + shift; bos and eos after them."""

    def __init__(self, shift: int = 0, vocab_size: int = 300):
        self.shift, self.vocab_size = shift, vocab_size
        self.bos_id, self.eos_id = 256 + shift, 257 + shift
        self.prefix_ids = (self.bos_id,)
        self.special_tokens = {"<bos>": self.bos_id, "<eos>": self.eos_id}
        self.fingerprint = hashlib.sha256(f"{shift} {vocab_size}".encode()).hexdigest()

    def encode(self, text, *, allow_special=False):
        data = text.encode() if isinstance(text, str) else text
        return [byte + self.shift for byte in data]

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids, *, continued=False):
        return bytes(int(i) - self.shift for i in ids if i - self.shift < 256)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder):
        Path(folder).mkdir(parents=True)
        Path(folder, "double.json").write_text(
            json.dumps([self.shift, self.vocab_size])
        )


def _load(folder):
    return ByteTokenizer(*json.loads(Path(folder, "double.json").read_text()))


@pytest.fixture
def byte_tokenizer(tmp_path, monkeypatch):
    """Saves a double with these settings, makes it loadable, and returns its folder."""
    monkeypatch.setattr(
        "maxlm.data.tokenizer.load.load_tokenizer", _load, raising=False
    )

    def save(shift: int = 0, vocab_size: int = 300) -> Path:
        folder = tmp_path / f"tokenizer-{shift}-{vocab_size}"
        if not folder.exists():
            ByteTokenizer(shift, vocab_size).save(folder)
        return folder

    return save


@pytest.fixture
def folder_bytes():
    """All files of a folder: relative path -> bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in files
        }

    return read


@pytest.fixture
def set_part_bytes(monkeypatch):
    """Sets the bytes of a source that a part has."""

    def change(size: int) -> None:
        for name in ("MIN_PART_BYTES", "MAX_PART_BYTES"):
            monkeypatch.setattr(f"maxlm.data.store.parts.{name}", size)

    return change


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 512 tokens, in chunks of 64."""
    monkeypatch.setattr(arrays, "SHARD_TOKENS", 512)
    for module in ("build", "store"):
        monkeypatch.setattr(f"maxlm.data.store.{module}.SHARD_TOKENS", 512)
    monkeypatch.setattr(arrays, "CHUNK_TOKENS", 64)


@pytest.fixture
def sources(tmp_path, small_shards):
    """Three files of 40 documents; arrays of several shards, so that segments are,
    too."""
    for part, texts in zip("abc", TEXTS, strict=True):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    return [
        SourceConfig(documents=(str(tmp_path / f"{part}.jsonl"),)) for part in "abc"
    ]


@pytest.fixture
def appended(tmp_path, sources, byte_tokenizer, set_part_bytes):
    build_store(sources[0], byte_tokenizer(), tmp_path / "store", workers=1)
    set_part_bytes(300)
    for source in sources[1:]:
        append_store(source, tmp_path / "store", workers=1)
    return tmp_path / "store"
