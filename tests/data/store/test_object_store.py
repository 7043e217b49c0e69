"""Stores in object stores, read through TensorStore's drivers from an S3 server on
loopback."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.loader.batches import LoaderConfig, make_batches
from maxlm.data.store.store import TokenStore, describe_store, summary_table
from maxlm.runtime.storage import make_kvstore_spec, to_place
from tests.ports import free_port

NETWORK = "check the URL, the network and the credentials"


@pytest.fixture(scope="module")
def s3():
    """A bucket on a server of its own; the drivers read its address once."""
    reason = "needs an S3 server: pip install 'moto[server]'"
    server_module = pytest.importorskip("moto.server", reason=reason)
    server = server_module.ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        import boto3

        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket="corpora")
        yield client
    server.stop()


@pytest.fixture
def url(s3, appended):
    """The store of three segments, copied to the bucket."""
    for path in appended.rglob("*"):
        if path.is_file():
            s3.upload_file(str(path), "corpora", f"web/a/{path.relative_to(appended)}")
    return "s3://corpora/web/a"


def test_reads_as_from_a_disk(url, appended):
    from maxlm.data.tokenizer.load import load_tokenizer

    local = TokenStore.open(appended)
    for place in (f"{url}/", Path(url)):
        store = TokenStore.open(place)
        assert (store.place, store.path) == (url, None)
    assert store.manifest == local.manifest
    for reader in (store, pickle.loads(pickle.dumps(store))):
        tokens = reader.read_many([0, 100, 2000], [5, 900, local.num_tokens])
        expected = local.read_many([0, 100, 2000], [5, 900, local.num_tokens])
        assert all(np.array_equal(a, b) for a, b in zip(tokens, expected, strict=True))
        assert np.array_equal(reader.document(100), local.document(100))
    store.verify()
    folder = store.tokenizer_folder
    assert load_tokenizer(folder).fingerprint == store.manifest.tokenizer_fingerprint
    for packing in ("concat", "best_fit"):
        config = LoaderConfig(seq_len=32, batch_size=4, packing=packing)
        a, b = (
            make_batches({"a": s}, {"a": 1}, config, seed=0).rows(3)
            for s in (store, local)
        )
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert describe_store(store)["path"] == summary_table(store).title == url


def test_what_is_wrong_is_said(s3, url):
    with pytest.raises(MaxlmError) as error:
        TokenStore.open("s3://corpora/none")
    assert (
        str(error.value)
        == f"s3://corpora/none: there is no token store here; {NETWORK}"
    )
    with pytest.raises(
        MaxlmError, match="https://corpora/none: stores cannot be read from https"
    ):
        TokenStore.open("https://corpora/none")
    store = TokenStore.open(url)
    key = "web/a/segments/000001/tokens/c/0"
    s3.put_object(Bucket="corpora", Key=key, Body=b"damage")
    with pytest.raises(
        MaxlmError, match=f"s3://corpora/{key}: this file has changed since it was"
    ):
        store.verify()
    s3.delete_object(Bucket="corpora", Key=key)
    with pytest.raises(MaxlmError, match=f"s3://corpora/{key}: this file is missing"):
        store.verify()
    with pytest.raises(
        MaxlmError, match=r"cannot read tokens .*segments/000001/tokens/c/0"
    ):
        TokenStore.open(url).document(50)


def test_who_cannot_be_reached_is_given_up(monkeypatch):
    """Within seconds; data are read more patiently."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    retries = {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"}
    monkeypatch.setattr("maxlm.runtime.storage._FEW_RETRIES", retries)
    with pytest.raises(MaxlmError, match=f"{NETWORK}$"):
        TokenStore.open("s3://corpora/web")
    assert "s3_request_retries" not in make_kvstore_spec("s3://b/a")


def test_places(monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert to_place("stores/a") == Path("stores/a")
    assert to_place(Path("gs://bucket/a/b/")) == "gs://bucket/a/b"
    expected = {"driver": "gcs", "bucket": "bucket", "path": "a/b/"}
    assert make_kvstore_spec("gs://bucket/a/b") == expected
    assert make_kvstore_spec("gs://bucket") == {**expected, "path": ""}
