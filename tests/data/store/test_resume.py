"""A build that was stopped goes on from its finished parts and ends the same, bit for bit."""

import fcntl
import json
import os

import pytest

from maxlm.config import MaxlmError
from maxlm.data.documents import SourceConfig
from maxlm.data.store import TokenStore, append_store, build_store
from maxlm.data.store import build as build_module


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    return SourceConfig(documents=(str(path),))


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


def stop_after(count, monkeypatch, name="make_part"):
    """Let `count` calls through, then stop; returns the list of calls let through."""
    real, calls = getattr(build_module, name), []

    def limited(job, *rest):
        if len(calls) == count:
            raise Stopped
        calls.append(job)
        return real(job, *rest)

    monkeypatch.setattr(build_module, name, limited)
    return calls


def build_until_stopped(source, tokenizer, out, count, name="make_part", **settings):
    """Build, stopped at call number `count` of `name`; returns the parts that were made."""
    with pytest.MonkeyPatch.context() as patch:
        made = stop_after(count if name == "make_part" else 10**9, patch)
        if name != "make_part":
            stop_after(count, patch, name)
        with pytest.raises(Stopped):
            build_store(source, tokenizer, out, **settings)
    return made


SETTINGS = {"workers": 1, "shard_bytes": 100}


def test_resumes_after_any_part(tmp_path, corpus, byte_tokenizer, folder_bytes):
    build_store(corpus, byte_tokenizer(), tmp_path / "unbroken", **SETTINGS)
    out = tmp_path / "store"
    done = 0
    for count in (0, 1, 3):
        build_until_stopped(corpus, byte_tokenizer(), out, count, **SETTINGS)
        done += count
        assert not out.exists()
    calls = build_until_stopped(corpus, byte_tokenizer(), out, 0, "assemble", **SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        again = stop_after(0, patch)
        build_store(corpus, byte_tokenizer(), out, **SETTINGS)
    assert again == []
    assert [call.index for call in calls] == list(range(done, done + len(calls)))
    assert len(calls) > 2
    assert folder_bytes(out) == folder_bytes(tmp_path / "unbroken")
    assert not (tmp_path / ".store.building").exists()


@pytest.mark.parametrize(
    ("suffix", "damage"), [("tokens", b"x"), ("lengths", b"x"), ("json", b'{"index": 0}')]
)
def test_a_damaged_part_is_made_again(
    tmp_path, corpus, byte_tokenizer, folder_bytes, monkeypatch, suffix, damage
):
    build_store(corpus, byte_tokenizer(), tmp_path / "unbroken", **SETTINGS)
    out = tmp_path / "store"
    build_until_stopped(corpus, byte_tokenizer(), out, 2, **SETTINGS)
    path = tmp_path / ".store.building" / "parts" / f"000001.{suffix}"
    path.write_bytes(path.read_bytes() + damage if suffix != "json" else damage)
    calls = stop_after(10**9, monkeypatch)
    build_store(corpus, byte_tokenizer(), out, **SETTINGS)
    assert calls[0].index == 1
    assert folder_bytes(out) == folder_bytes(tmp_path / "unbroken")


@pytest.mark.parametrize("change", ["text", "tokenizer", "part size"])
def test_parts_of_other_inputs_are_not_used(tmp_path, corpus, byte_tokenizer, change):
    out, tokenizer, settings = tmp_path / "store", byte_tokenizer(), dict(SETTINGS)
    build_until_stopped(corpus, tokenizer, out, 3, **settings)
    if change == "text":
        path = tmp_path / "a.jsonl"
        path.write_text(path.read_text().replace("text 0", "next 0"))
    elif change == "tokenizer":
        tokenizer = byte_tokenizer(7)
    else:
        settings["shard_bytes"] = 200
    build_store(corpus, tokenizer, out, **settings)
    build_store(corpus, tokenizer, tmp_path / "fresh", **settings)
    stores = [TokenStore.open(path) for path in (out, tmp_path / "fresh")]
    first, second = (store.read(0, store.num_tokens).tolist() for store in stores)
    assert first == second


def test_two_builds_of_one_store_do_not_mix(tmp_path, corpus, byte_tokenizer):
    building = tmp_path / ".store.building"
    building.mkdir()
    with open(building / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MaxlmError) as caught:
            build_store(corpus, byte_tokenizer(), tmp_path / "store", **SETTINGS)
    assert str(caught.value) == (
        f"{building}: another process is at work in this folder; wait for it to end"
    )
    build_store(corpus, byte_tokenizer(), tmp_path / "store", **SETTINGS)


@pytest.mark.parametrize("append", [False, True])
def test_a_kill_within_the_swap_leaves_the_old_store(
    tmp_path, corpus, byte_tokenizer, folder_bytes, append
):
    out, building = tmp_path / "store", tmp_path / ".store.building"
    build_store(corpus, byte_tokenizer(), out, **SETTINGS)
    before, real = folder_bytes(out), os.rename

    def rename(source, target):
        if str(source).endswith("building/store"):
            raise Stopped
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Stopped):
            build_store(corpus, byte_tokenizer(5), out, force=True, **SETTINGS)
    assert not out.exists()
    if append:
        append_store(corpus, out, **SETTINGS)
    else:
        with pytest.raises(MaxlmError, match="built from other inputs"):
            build_store(corpus, byte_tokenizer(5), out, **SETTINGS)
    assert folder_bytes(out) == before
    build_store(corpus, byte_tokenizer(5), out, force=True, **SETTINGS)
    assert folder_bytes(out) != before
    assert not building.exists()


def test_a_failed_swap_leaves_the_old_store(tmp_path, corpus, byte_tokenizer, folder_bytes):
    out = tmp_path / "store"
    build_store(corpus, byte_tokenizer(), out, **SETTINGS)
    before = folder_bytes(out)
    real = os.rename

    def rename(source, target):
        if str(source).endswith("building/store"):
            raise OSError(28, "No space left on device")
        real(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(MaxlmError) as caught:
            build_store(corpus, byte_tokenizer(5), out, force=True, **SETTINGS)
    assert str(caught.value) == (
        f"{tmp_path}/.store.building: cannot write: No space left on device; free some disk "
        "space, or check the folder and its permissions"
    )
    assert folder_bytes(out) == before
