"""Several builders of one store at once: the same files as one builder's, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from maxlm.config import MaxlmError
from maxlm.data.documents import SourceConfig
from maxlm.data.store import build as build_module
from maxlm.data.store import build_store

SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    from conftest import ByteTokenizer
    import maxlm.data.tokenizer
    maxlm.data.tokenizer.load_tokenizer = lambda folder: ByteTokenizer()
    from maxlm.data.documents import SourceConfig
    from maxlm.data.store import build_store, parts
    root = Path(sys.argv[1])
    real = parts.make_part
    def make_part(job):
        part = real(job)
        time.sleep(0.05)
        print(job.index, flush=True)
        return part
    parts.make_part = make_part
    source = SourceConfig(documents=(str(root / "a.jsonl"),))
    build_store(source, "t", root / "store", workers=1, shard_bytes=100, join=True)
    """
)


@pytest.fixture
def corpus(tmp_path):
    lines = [json.dumps({"text": f"text {i} " + "x" * (i % 50)}) + "\n" for i in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    return SourceConfig(documents=(str(tmp_path / "a.jsonl"),))


def start(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), os.path.dirname(__file__)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_builders_share_the_parts(tmp_path, corpus, byte_tokenizer, folder_bytes):
    build_store(corpus, byte_tokenizer(), tmp_path / "alone", workers=1, shard_bytes=100)
    builders = [start(tmp_path) for _ in range(3)]
    ended = [builder.communicate(timeout=300) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0, 0], ended
    made = sorted(int(index) for out, _ in ended for index in out.split())
    assert made == list(range(len(made)))  # Each part once.
    assert folder_bytes(tmp_path / "store") == folder_bytes(tmp_path / "alone")
    assert not (tmp_path / ".store.building").exists()


def test_the_others_do_what_a_killed_one_left(tmp_path, corpus, byte_tokenizer, folder_bytes):
    build_store(corpus, byte_tokenizer(), tmp_path / "alone", workers=1, shard_bytes=100)
    victim, other = start(tmp_path), start(tmp_path)
    parts = tmp_path / ".store.building" / "parts"
    while len(list(parts.glob("*.json"))) < 2 and victim.poll() is None:
        time.sleep(0.002)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    other.communicate(timeout=300)
    assert other.returncode == 0
    assert folder_bytes(tmp_path / "store") == folder_bytes(tmp_path / "alone")


def test_a_late_builder_finds_the_store(tmp_path, corpus, byte_tokenizer):
    first = build_store(corpus, byte_tokenizer(), tmp_path / "store", workers=1, join=True)
    assert build_store(corpus, byte_tokenizer(), tmp_path / "store", workers=1, join=True) == first
    assert not (tmp_path / ".store.building").exists()


def test_builders_of_other_inputs_do_not_join(tmp_path, corpus, byte_tokenizer):
    building = tmp_path / ".store.building"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "assemble", None)
        with pytest.raises(TypeError):
            build_store(corpus, byte_tokenizer(), tmp_path / "store", workers=1, join=True)
    with pytest.raises(MaxlmError) as error:
        build_store(corpus, byte_tokenizer(5), tmp_path / "store", workers=1, join=True)
    assert str(error.value) == (
        f"{building}: other inputs are being built here, or were once; give all builders the same "
        "inputs, or remove this folder"
    )
    assert list((building / "parts").iterdir())
