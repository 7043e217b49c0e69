"""Stores in object stores, read through TensorStore's drivers from a server on loopback that speaks
as much of the protocols of S3 and Google Cloud Storage as reading takes."""

import json
import pickle
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.documents import SourceConfig
from maxlm.data.loader import LoaderConfig, make_batches
from maxlm.data.store import TokenStore, append_store, build_store
from maxlm.data.store.describe import describe, summary_table
from maxlm.runtime.storage import make_kvstore_spec, to_place
from tests.ports import free_port


class Objects(BaseHTTPRequestHandler):
    """Serves ROOT/BUCKET/KEY."""

    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self):
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        google = path.startswith("/storage/v1/b/")
        if google:
            path = path.removeprefix("/storage/v1/b").replace("/o/", "/", 1).removesuffix("/o")
        file = self.root / path.strip("/")
        if file.is_dir():
            low, high = (query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
            prefix = query.get("prefix", [""])[0]
            names = (p.relative_to(file).as_posix() for p in file.rglob("*") if p.is_file())
            keys = sorted(
                name
                for name in names
                if name.startswith(prefix) and low <= name and (not high or name < high)
            )
            if google:
                self.reply(200, json.dumps({"items": [{"name": key} for key in keys]}).encode())
            else:
                rows = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
                truncated = "<IsTruncated>false</IsTruncated>"
                text = f"<ListBucketResult>{truncated}{rows}</ListBucketResult>"
                self.reply(200, text.encode())
        elif file.is_file():
            data, size = file.read_bytes(), file.stat().st_size
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                low, high = (size - int(last), size) if not first else (int(first), size)
                high = min(high, int(last) + 1) if first and last else high
                self.reply(206, data[low:high], f"bytes {low}-{high - 1}/{size}")
            else:
                self.reply(200, data)
        else:
            self.reply(404, b"")

    do_HEAD = do_GET

    def reply(self, status, body, content_range=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"1"')
        self.send_header("x-goog-generation", "1")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What the server serves. One for the module: the drivers read its address once."""
    folder = tmp_path_factory.mktemp("objects")
    handler = type("Handler", (Objects,), {"root": folder})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_REGION", "nowhere-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        yield folder
    server.shutdown()
    server.server_close()


@pytest.fixture
def local(root, tmp_path, byte_tokenizer):
    """A store of two segments, in the bucket `corpora`."""
    path = root / "corpora" / "web" / tmp_path.name
    for part in "ab":
        texts = [f"{part} {i} " + "xyz" * (i % 7) for i in range(200)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{part}.jsonl").write_text(lines)
    sources = [SourceConfig(documents=(str(tmp_path / f"{part}.jsonl"),)) for part in "ab"]
    build_store(sources[0], byte_tokenizer(), path, workers=1)
    append_store(sources[1], path, workers=1)
    return TokenStore.open(path)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_reads_as_from_a_disk(root, local, scheme):
    from maxlm.data.tokenizer import load_tokenizer

    url = f"{scheme}://{local.path.relative_to(root)}"
    for given in (url, f"{url}/", Path(url)):
        store = TokenStore.open(given)
        assert (store.place, store.path) == (url, None)
    assert store.manifest == local.manifest
    copy = pickle.loads(pickle.dumps(store))
    for each in (store, copy):
        tokens = each.read_many([0, 100, 2000], [5, 900, local.num_tokens])
        expected = local.read_many([0, 100, 2000], [5, 900, local.num_tokens])
        assert all(np.array_equal(a, b) for a, b in zip(tokens, expected, strict=True))
        assert np.array_equal(each.document(200), local.document(200))
    store.verify()
    folder = store.tokenizer_folder
    assert load_tokenizer(folder).fingerprint == store.manifest.tokenizer_fingerprint
    for packing in ("concat", "best_fit"):
        config = LoaderConfig(seq_len=32, batch_size=4, packing=packing)
        a, b = (make_batches({"a": s}, {"a": 1}, config, seed=0).rows(3) for s in (store, local))
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert describe(store)["path"] == summary_table(store).title == url


def test_what_is_wrong_is_said(root, local):
    for url in ("s3://corpora/none", "gs://none/none"):
        with pytest.raises(MaxlmError) as error:
            TokenStore.open(url)
        assert str(error.value) == (
            f"{url}: there is no token store here; check the URL, the network and the credentials"
        )
    with pytest.raises(MaxlmError) as error:
        TokenStore.open("https://corpora/none")
    assert str(error.value) == (
        "https://corpora/none: stores cannot be read from https://; give a folder, or a URL that "
        "begins with gs:// or s3://"
    )
    url = f"s3://{local.path.relative_to(root)}"
    store = TokenStore.open(url)
    shard = local.path / "segments/000001/tokens/c/0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(MaxlmError) as error:
        store.verify()
    assert str(error.value).startswith(
        f"{url}/segments/000001/tokens/c/0: this file has changed since it was written; "
    )
    shard.unlink()
    with pytest.raises(MaxlmError, match="segments/000001/tokens/c/0: this file is missing"):
        store.verify()
    with pytest.raises(MaxlmError, match=f"{url}/segments/000001/tokens/c/0: cannot read"):
        TokenStore.open(url).document(300)


def test_a_store_that_may_not_be_read(root, local, monkeypatch):
    """Listing is denied, then the list of checksums, then everything."""
    denied, real = [], Objects.do_GET

    def guarded(self):
        if any(part in unquote(self.path) for part in denied):
            self.reply(403, b"")
        else:
            real(self)

    monkeypatch.setattr(Objects, "do_GET", guarded)
    monkeypatch.setattr(Objects, "do_HEAD", guarded)
    read_failure_hint = "check the URL, the network and the credentials"

    def refused(call):
        with pytest.raises(MaxlmError) as error:
            call()
        assert str(error.value).endswith(read_failure_hint)
        return str(error.value)

    url = f"s3://{local.path.relative_to(root)}"
    store = TokenStore.open(url)
    denied.append("list-type")
    assert refused(lambda: store.tokenizer_folder).startswith(f"{url}: cannot read the tokenizer: ")
    denied[:] = ["checksums.sha256"]
    assert refused(store.verify).startswith(f"{url}/checksums.sha256: cannot read: ")
    denied[:] = [""]
    assert refused(lambda: TokenStore.open(url)).startswith(f"{url}/manifest.json: cannot read: ")


def test_a_tokenizer_with_folders_is_copied(root, local):
    (local.path / "tokenizer" / "more").mkdir()
    (local.path / "tokenizer" / "more" / "a.txt").write_text("deep")
    store = TokenStore.open(f"s3://{local.path.relative_to(root)}")
    assert (store.tokenizer_folder / "more" / "a.txt").read_text() == "deep"


def test_who_cannot_be_reached_is_given_up(monkeypatch):
    """Within seconds; data are read more patiently."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    retries = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    monkeypatch.setattr("maxlm.runtime.storage._FEW_RETRIES", retries)
    with pytest.raises(MaxlmError, match=r"check the URL, the network and the credentials$"):
        TokenStore.open("s3://corpora/web")
    assert make_kvstore_spec("gs://b/a", patient=False)["gcs_request_retries"] == retries
    assert "s3_request_retries" not in make_kvstore_spec("s3://b/a")


def test_places(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert to_place("stores/a") == Path("stores/a")
    assert to_place(Path("gs://bucket/a/b/")) == "gs://bucket/a/b"
    assert make_kvstore_spec("gs://bucket/a/b") == {
        "driver": "gcs",
        "bucket": "bucket",
        "path": "a/b/",
    }
    assert make_kvstore_spec("gs://bucket") == {"driver": "gcs", "bucket": "bucket", "path": ""}
