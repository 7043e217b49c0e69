"""A build that was stopped goes on from its finished parts and ends the same, bit for
bit."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.store import build as build_module
from maxlm.data.store.build import append_store, build_store
from maxlm.data.store.store import TokenStore


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40))
    )
    return SourceConfig(documents=(str(path),))


class Stopped(BaseException):
    """Stands for a kill: nothing may catch it."""


def stop_after(count, monkeypatch, name="tokenize_part", module=build_module):
    """Let `count` calls through, then stop; returns the list of calls let through."""
    real = getattr(module, name)
    calls = []

    def limited(*arguments):
        if len(calls) == count:
            raise Stopped
        calls.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(module, name, limited)
    return calls


def build_until_stopped(source, tokenizer, out, count, name="tokenize_part"):
    """Build, stopped at call number `count` of `name`; returns the parts that were
    made."""
    with pytest.MonkeyPatch.context() as patch:
        finished = stop_after(count if name == "tokenize_part" else 10**9, patch)
        if name != "tokenize_part":
            stop_after(count, patch, name)
        with pytest.raises(Stopped):
            build_store(source, tokenizer, out, workers=1)
    return finished


@pytest.fixture(autouse=True)
def small_parts(set_part_bytes):
    set_part_bytes(100)


def test_resumes_after_any_part(tmp_path, corpus, byte_tokenizer, folder_bytes):
    build_store(corpus, byte_tokenizer(), tmp_path / "unbroken", workers=1)
    out = tmp_path / "store"
    done = 0
    for count in (0, 1, 3):
        build_until_stopped(corpus, byte_tokenizer(), out, count)
        done += count
        assert not out.exists()
    calls = build_until_stopped(corpus, byte_tokenizer(), out, 0, "create_array")
    with pytest.MonkeyPatch.context() as patch:
        again = stop_after(0, patch)
        build_store(corpus, byte_tokenizer(), out, workers=1)
    assert again == []
    assert [call.index for call in calls] == list(range(done, done + len(calls)))
    assert len(calls) > 2
    assert folder_bytes(out) == folder_bytes(tmp_path / "unbroken")
    assert not (tmp_path / ".store.building").exists()


def test_a_part_that_a_power_failure_left_empty_is_made_again(
    tmp_path, corpus, byte_tokenizer, folder_bytes
):
    build_store(corpus, byte_tokenizer(), tmp_path / "unbroken", workers=1)
    build_until_stopped(corpus, byte_tokenizer(), tmp_path / "store", 2)
    finished = sorted((tmp_path / ".store.building").rglob("*.json"))
    finished[-1].write_bytes(b"")
    build_store(corpus, byte_tokenizer(), tmp_path / "store", workers=1)
    assert folder_bytes(tmp_path / "store") == folder_bytes(tmp_path / "unbroken")


def test_a_kill_while_a_store_is_replaced_loses_neither(
    tmp_path, corpus, byte_tokenizer
):
    out = tmp_path / "store"
    tokenizer = byte_tokenizer(7)
    old = build_store(corpus, byte_tokenizer(), out, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, patch, "rename", os)
        with pytest.raises(Stopped):
            build_store(corpus, tokenizer, out, force=True, workers=1)
    assert not out.exists()
    with pytest.raises(MaxlmError, match="built from other inputs: another tokenizer"):
        build_store(corpus, tokenizer, out, workers=1)
    assert TokenStore.open(out).manifest == old
    (tmp_path / ".store.building" / "replaced" / "left").mkdir(
        parents=True
    )  # By a later kill.
    new = build_store(corpus, tokenizer, out, force=True, workers=1)
    assert TokenStore.open(out).manifest == new != old
    assert not (tmp_path / ".store.building").exists()


@pytest.mark.parametrize("change", ["text", "tokenizer", "part size"])
def test_parts_of_other_inputs_are_not_used(
    tmp_path, corpus, byte_tokenizer, change, set_part_bytes
):
    out = tmp_path / "store"
    tokenizer = byte_tokenizer()
    build_until_stopped(corpus, tokenizer, out, 3)
    if change == "text":
        path = tmp_path / "a.jsonl"
        path.write_text(path.read_text().replace("text 0", "next 0"))
    elif change == "tokenizer":
        tokenizer = byte_tokenizer(7)
    else:
        set_part_bytes(200)
    build_store(corpus, tokenizer, out, workers=1)
    build_store(corpus, tokenizer, tmp_path / "fresh", workers=1)
    stores = [TokenStore.open(path) for path in (out, tmp_path / "fresh")]
    first, second = (store.read(0, store.num_tokens).tolist() for store in stores)
    assert first == second


def test_two_builds_of_one_store_do_not_mix(tmp_path, corpus, byte_tokenizer):
    building = tmp_path / ".store.building"
    building.mkdir()
    with open(building / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            MaxlmError, match=r"store.building: another process is at work in this"
        ):
            build_store(corpus, byte_tokenizer(), tmp_path / "store", workers=1)
    build_store(corpus, byte_tokenizer(), tmp_path / "store", workers=1)


JOINED = """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from conftest import ByteTokenizer
    import maxlm.data.tokenizer.load
    maxlm.data.tokenizer.load.load_tokenizer = lambda folder: ByteTokenizer()
    from maxlm.data.documents.config import SourceConfig
    from maxlm.data.store import parts
    from maxlm.data.store.build import build_store
    root = Path(sys.argv[1])
    real = parts._read_texts
    def read(source, planned, job, counts):
        print(job.index, flush=True)
        yield from real(source, planned, job, counts)
        time.sleep(0.05)
    parts._read_texts = read
    parts.MIN_PART_BYTES = parts.MAX_PART_BYTES = 100
    source = SourceConfig(documents=(str(root / "a.jsonl"),))
    build_store(source, "t", root / "store", workers=1, join=True)
"""


@pytest.mark.heavy
@pytest.mark.parametrize("kill", [False, True])
def test_builders_share_the_parts(tmp_path, corpus, byte_tokenizer, folder_bytes, kill):
    """The same files as one builder's, whoever dies."""
    build_store(corpus, byte_tokenizer(), tmp_path / "alone", workers=1)
    script = [sys.executable, "-c", textwrap.dedent(JOINED), str(tmp_path)]
    script.append(os.path.dirname(__file__))
    builders = [
        subprocess.Popen(script, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    first = builders[0].stdout.readline()
    if kill:
        builders[0].kill()
    part_numbers = (
        first + "".join(builder.communicate(timeout=300)[0] for builder in builders)
    ).split()
    assert [builder.returncode for builder in builders] == [
        -signal.SIGKILL if kill else 0,
        0,
    ]
    # Each part once; of the one being made twice, if its builder was killed.
    assert len(part_numbers) - len(set(part_numbers)) <= kill
    assert folder_bytes(tmp_path / "store") == folder_bytes(tmp_path / "alone")
    assert not (tmp_path / ".store.building").exists()
    build_store(corpus, byte_tokenizer(), tmp_path / "store", join=True, workers=1)


@pytest.mark.parametrize("name", ["tokenize_part", "create_array", "write_manifest"])
def test_a_killed_append_goes_on(
    tmp_path, sources, byte_tokenizer, appended, folder_bytes, name
):
    out = tmp_path / "again"
    build_store(sources[0], byte_tokenizer(), out, workers=1)
    append_store(sources[1], out, workers=1)
    before = (out / "manifest.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        stop_after(2 if name == "tokenize_part" else 0, patch, name)
        with pytest.raises(Stopped):
            append_store(sources[2], out, workers=1)
    assert (out / "manifest.json").read_bytes() == before
    TokenStore.open(out).verify()
    append_store(sources[2], out, workers=1)
    assert folder_bytes(out) == folder_bytes(appended)
    assert not (tmp_path / ".again.building").exists()
