"""Checkpoints in several places: the newest that can be read is found, whatever others
suffered."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.checkpoint import checkpointer, reading
from maxlm.checkpoint.checkpointer import Checkpointer, SkippedCheckpoint
from maxlm.checkpoint.config import CheckpointConfig
from maxlm.checkpoint.remote import RemoteTier
from maxlm.config import MaxlmError
from tests.errors import message

SPECS = {
    "embed": PartitionSpec("fsdp", "tensor"),
    "scale": PartitionSpec(),
    "up": PartitionSpec(None, "tensor"),
}
SHAPES = {"embed": (72, 30), "scale": (5,), "up": (3, 84)}


def state_of(mesh, step):
    random = np.random.default_rng(step)
    params = {}
    for name, shape in SHAPES.items():
        values = random.normal(size=shape).astype(np.float32)
        params[name] = jax.device_put(values, NamedSharding(mesh, SPECS[name]))
    replicated = NamedSharding(mesh, PartitionSpec())
    return {"params": params, "step": jax.device_put(np.int32(step), replicated)}


def abstract(mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        state_of(mesh, 0),
    )


@pytest.fixture
def here(mesh):
    return mesh(fsdp=2, tensor=2)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Between two tries to read."""
    monkeypatch.setattr(reading, "_RETRY_SECONDS", (0.0,))


def write(folder, config, mesh, *steps):
    """Save these steps as one run does, which then ends."""
    with Checkpointer(folder, "run", config) as tiers:
        for step in steps:
            tiers.save(step, state_of(mesh, step), {"config": {}})
            tiers.wait()
            assert tiers.remote_copy_failure is None  # waits for the copy


def newest(folder, config, mesh):
    """(step, tier) of what is restored, after checking it; and what was skipped."""
    with Checkpointer(folder, "run", config) as tiers:
        candidates, skipped = tiers.find()
        template = abstract(mesh)
        state, chosen, skipped_in_restoring = tiers.restore_newest(candidates, template)
        skipped = [*skipped, *skipped_in_restoring]
        if chosen is None:
            return None, skipped
        jax.tree.map(np.testing.assert_array_equal, state, state_of(mesh, chosen.step))
        shardings = [array.sharding for array in jax.tree.leaves(state)]
        assert shardings == [array.sharding for array in jax.tree.leaves(template)]
        tiers.discard_skipped(skipped, chosen.step)
        return (chosen.step, chosen.tier.name), skipped


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def copies(place):
    """Steps of which a folder of copies has files."""
    names = {path.relative_to(place).parts[0] for path in files(place)}
    return sorted(names - {"OWNER"})


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": lambda folder: flip_a_bit(largest(folder / "state")),
    "missing shard": lambda folder: largest(folder / "state").unlink(),
    "empty metadata": lambda folder: (folder / "metadata" / "metadata").write_text(""),
    "missing state": lambda folder: shutil.rmtree(folder / "state"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_newest_checkpoint_is_skipped_and_reported(tmp_path, here, damage):
    write(tmp_path, CheckpointConfig(every_steps=10), here, 10, 20)
    damage(tmp_path / "20")
    chosen, skipped = newest(tmp_path, CheckpointConfig(), here)
    assert chosen == (10, "folder")
    [one] = skipped
    assert str(one).startswith("checkpoint 20 is skipped: unreadable")
    # It makes room for the step's next checkpoint, and is kept in case it can be
    # repaired.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20.damaged"]


@pytest.mark.heavy
def test_any_flipped_bit_is_found_or_does_no_harm(tmp_path, here, monkeypatch):
    """In a sample of all files of a checkpoint in all places: arrays, metadata, Orbax's
    own."""
    monkeypatch.setattr(reading, "_RETRY_SECONDS", ())
    config = CheckpointConfig(
        every_steps=20,
        local_every_steps=10,
        local_folder=str(tmp_path / "disk"),
        remote_folder=str(tmp_path / "there"),
    )
    metadata = {
        "config": {"seed": 7, "rate": 1e-05},
        "skipped_batches": [[3, 5]],
        "losses": None,
    }
    random = np.random.default_rng(0)
    num_restored = Counter()  # By step.
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        for step in (20, 40, 50):  # the folder's and their copies, and a local one
            tiers.save(step, state_of(here, step), metadata)
            tiers.wait()
        assert tiers.remote_copy_failure is None
        [local] = (tmp_path / "disk").glob("run-*/process-0/50.safetensors")
        remote = tmp_path / "there" / "run" / "40" / "metadata" / "metadata"
        for path in (local, remote, *files(tmp_path / "run" / "40")):
            good = path.read_bytes()
            # Of a local file only the header: to find it, its arrays are not read.
            num_bytes = good.index(b'}"}') if path is local else len(good)
            is_metadata = path is local or path.name == "metadata"
            num_flips = 10 if is_metadata else 3
            for place in random.integers(8 * num_bytes, size=num_flips):
                bad = bytearray(good)
                bad[place // 8] ^= 1 << int(place % 8)
                path.write_bytes(bad)
                candidates, skipped = tiers.find()
                for candidate in candidates:
                    for name, value in metadata.items():
                        assert candidate.metadata.get(name) == value, (path, place)
                if is_metadata:
                    # This one bit alone changes nothing that is said.
                    is_harmless = bad == good.replace(b"1e-05", b"1E-05")
                    assert skipped or is_harmless, (path, place)
                    for checkpoint in skipped:
                        assert "is skipped: unreadable" in str(checkpoint)
                else:
                    in_folder = [
                        candidate
                        for candidate in candidates
                        if candidate.tier.name == "folder"
                    ]
                    state, chosen, _ = tiers.restore_newest(
                        in_folder, abstract(here), ((3, 5),)
                    )
                    expected = state_of(here, chosen.step)
                    jax.tree.map(np.testing.assert_array_equal, state, expected)
                    num_restored[chosen.step] += 1
            path.write_bytes(good)
    # Or hardly any damage was looked at.
    assert num_restored[20] > num_restored[40] / 4


def make_local_config(tmp_path, remote_folder=None):
    return CheckpointConfig(
        every_steps=10,
        local_every_steps=3,
        local_folder=str(tmp_path / "disk"),
        remote_folder=remote_folder,
    )


def test_local_checkpoints_between_the_folder_s_keep_the_two_newest(
    tmp_path, here, mesh
):
    config = make_local_config(tmp_path)
    write(tmp_path / "run", config, here, 6, 9, 10, 12)
    [process_folder] = (tmp_path / "disk").glob("run-*/process-0")
    names = sorted(path.name for path in process_folder.iterdir())
    assert names == ["12.safetensors", "9.safetensors"]
    # A run of the same name in another folder has none.
    with Checkpointer(tmp_path / "other", "run", config) as tiers:
        assert tiers.find() == ([], [])
    assert newest(tmp_path / "run", config, here) == ((12, "local"), [])
    chosen, [skipped] = newest(tmp_path / "run", config, mesh(fsdp=4))
    assert chosen == (10, "folder")
    message = "unreadable (it was written on another mesh or by other processes)"
    assert skipped.why == message


def test_local_files_of_kills_and_former_process_numbers_are_deleted(tmp_path, here):
    """Each start may give a host another number."""
    config = CheckpointConfig(local_every_steps=1, local_folder=str(tmp_path / "disk"))
    write(tmp_path / "run", config, here, 1)
    [process_folder] = (tmp_path / "disk").glob("run-*/process-0")
    other = process_folder.rename(process_folder.with_name("process-3"))
    (other / ".tmpXy").write_text("half")
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        assert [path.name for path in other.iterdir()] == ["1.safetensors"]
        tiers.save(2, state_of(here, 2), {})
        tiers.wait()
        assert files(process_folder.parent) == [process_folder / "2.safetensors"]
        tiers.local.clear()
        assert not process_folder.parent.exists()


def test_local_checkpoint_that_cannot_be_written_is_only_reported(
    tmp_path, here, monkeypatch, capfd
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_local_config(tmp_path)
    monkeypatch.setattr("maxlm.checkpoint.local.save_file", full)
    write(tmp_path / "run", config, here, 3)
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"local checkpoint 3 was not written to {tmp_path}/disk/run-"
    )
    assert line.endswith("No space left on device); training continues")
    (tmp_path / "file").write_text("")
    in_a_file = CheckpointConfig(local_folder=str(tmp_path / "file"))
    with pytest.raises(MaxlmError, match=r"file.*: cannot write: "):
        write(tmp_path / "run", in_a_file, here)


def test_time_asks_for_a_checkpoint_too(tmp_path, here, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
    config = CheckpointConfig(every_steps=0, every_minutes=2)
    with Checkpointer(tmp_path, "run", config) as tiers:
        assert not tiers.is_due_by_time()
        now[0] = 120.0
        assert tiers.is_due_by_time()
        assert tiers.save(7, state_of(here, 7), {}, force=True) == "folder"
        assert not tiers.is_due_by_time()
        assert tiers.save(8, state_of(here, 8), {}) is None
        # There is one of this step already.
        assert tiers.save(7, state_of(here, 7), {}, force=True) is None


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
        client.create_bucket(Bucket="models")
        yield client
    server.stop()


@pytest.mark.heavy
def test_checkpoints_are_copied_to_a_bucket_and_found_there(tmp_path, here, s3):
    config = CheckpointConfig(
        every_steps=10, keep_last=2, remote_folder="s3://models/a"
    )
    write(tmp_path / "run", config, here, 10, 20, 30)
    listed = s3.list_objects_v2(Bucket="models", Prefix="a/run/")["Contents"]
    sizes = {entry["Key"].removeprefix("a/run/"): entry["Size"] for entry in listed}
    assert {key.split("/")[0] for key in sizes} == {"20", "30", "OWNER"}  # keep_last
    assert newest(tmp_path / "run", config, here) == ((30, "folder"), [])
    flip_a_bit(largest(tmp_path / "run" / "30" / "state"))
    chosen, [skipped] = newest(tmp_path / "run", config, here)
    assert chosen == (30, "remote")
    assert skipped.tier.name == "folder"
    shutil.rmtree(tmp_path / "run")
    assert newest(tmp_path / "run", config, here) == ((30, "remote"), [])
    assert not (tmp_path / "run" / ".fetched").exists()
    # A copy that is incomplete, and one that is damaged.
    s3.delete_object(Bucket="models", Key="a/run/30/COMPLETE")
    keys_of_20 = [key for key in sizes if key.startswith("20/")]
    key = f"a/run/{max(keys_of_20, key=sizes.__getitem__)}"
    body = bytearray(s3.get_object(Bucket="models", Key=key)["Body"].read())
    body[len(body) // 2] ^= 1
    s3.put_object(Bucket="models", Key=key, Body=bytes(body))
    chosen, skipped = newest(tmp_path / "run", config, here)
    assert chosen is None
    [one] = skipped
    assert str(one).startswith("remote checkpoint 20 is skipped: unreadable")
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        tiers.tiers[1].discard_skipped({20: True}, 0)  # It may be readable another day.
        assert tiers.tiers[1].steps() == []
    assert s3.head_object(Bucket="models", Key="a/run/20/COMPLETE")
    nowhere = CheckpointConfig(remote_folder="s3://nowhere/a")
    text = message(Checkpointer, tmp_path, "run", nowhere)
    assert text.startswith("s3://nowhere/a/run: cannot be reached (")
    assert "NoSuchBucket" in text
    assert text.endswith("; check the URL, the network and the credentials")


def test_google_bucket(tmp_path, here):
    reason = "needs a server: pip install gcp-storage-emulator"
    server_module = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    server = server_module.create_server(
        "127.0.0.1", 0, in_memory=True, default_bucket="models"
    )
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            port = server._api._httpd.server_port
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
            config = CheckpointConfig(every_steps=10, remote_folder="gs://models/a")
            write(tmp_path / "first", config, here, 20)
            shutil.rmtree(tmp_path / "first")
            assert newest(tmp_path / "first", config, here) == ((20, "remote"), [])
    finally:
        server.stop()


def test_copy_that_fails_is_reported_and_made_later(tmp_path, here, monkeypatch, capfd):
    place = tmp_path / "there" / "run"
    config = CheckpointConfig(
        every_steps=1, keep_last=1, remote_folder=str(tmp_path / "there")
    )
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        (place / "1").write_text("in the way")
        tiers.save(1, state_of(here, 1), {})
        assert tiers.remote_copy_failure.startswith(
            f"the last checkpoint is not in {place}: "
        )
        assert capfd.readouterr().err.startswith(
            f"checkpoint 1 was not copied to {place}: "
        )
        (place / "1").unlink()
        tiers.copy_newest_to_remote()
        assert tiers.remote_copy_failure is None
    with monkeypatch.context() as patch:

        def refused(*_):
            raise MaxlmError(
                "cannot be reached (PERMISSION_DENIED)", where="there", fix="ask"
            )

        patch.setattr(RemoteTier, "_delete", refused)
        # An old one that stays is no failure.
        write(tmp_path / "run", config, here, 2)
    assert capfd.readouterr().err.startswith(
        "older copies were not deleted: there: cannot be re"
    )
    assert copies(place) == ["1", "2"]
    write(tmp_path / "run", config, here, 3)
    assert copies(place) == ["3"]


def test_copies_of_another_run_of_the_name_are_refused(tmp_path, here):
    place = tmp_path / "there" / "run"
    config = CheckpointConfig(every_steps=10, remote_folder=str(tmp_path / "there"))
    write(tmp_path / "one", config, here, 10)
    assert message(Checkpointer, tmp_path / "two", "run", config) == (
        f"{place}: holds the copies of the run in {tmp_path}/one, and this one is in "
        f"{tmp_path}/two; give this run another name=..., or delete the file OWNER "
        "there to take over what it holds"
    )
    (place / "OWNER").unlink()
    assert newest(tmp_path / "two", config, here) == ((10, "remote"), [])


def test_copy_that_finds_no_room_here_is_not_taken_for_a_damaged_one(tmp_path, here):
    config = CheckpointConfig(every_steps=10, remote_folder=str(tmp_path / "there"))
    write(tmp_path / "run", config, here, 10)
    shutil.rmtree(tmp_path / "run" / "10")
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        candidates, _ = tiers.find()
        (tmp_path / "run" / ".fetched").write_text("in the way")
        with pytest.raises(MaxlmError, match="cannot write"):
            tiers.restore_newest(candidates, abstract(here))


LEAVES = """
import sys, time
from pathlib import Path
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.config import CheckpointConfig

folder = Path(sys.argv[1])
for number in range(3000):
    (folder / "run" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "run" / "1" / str(number)).write_bytes(bytes(1000))
config = CheckpointConfig(remote_folder=str(folder / "there"))
with Checkpointer(folder / "run", "run", config) as tiers:
    tiers.remote.start_copy(1)
    while not list((folder / "there").glob("*/1/*")):
        time.sleep(0.001)
    assert tiers.remote.steps_being_copied
    sys.exit(75)
"""


@pytest.mark.heavy
def test_process_that_ends_while_a_copy_is_made_keeps_its_exit_code(tmp_path):
    """A thread in TensorStore at that time would abort it, mostly."""
    command = [sys.executable, "-c", LEAVES, tmp_path]
    ended = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=240
    )
    assert ended.returncode == 75


@pytest.fixture
def slow_copy(monkeypatch):
    """(set once a copy has begun, to be set for copies to go on)"""
    started = threading.Event()
    resume = threading.Event()
    original = RemoteTier._copy

    def slow(self, step):
        started.set()
        while not (resume.is_set() or self._cancelling.is_set()):
            resume.wait(0.01)
        original(self, step)

    monkeypatch.setattr(RemoteTier, "_copy", slow)
    return started, resume


def test_cancelled_copy_is_made_later(tmp_path, here, slow_copy):
    started, resume = slow_copy
    config = CheckpointConfig(every_steps=1, remote_folder=str(tmp_path / "there"))
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        tiers.save(1, state_of(here, 1), {})
        assert started.wait(60)
        tiers.remote.close()
        tiers.wait()
        assert copies(tmp_path / "there" / "run") == []
        resume.set()
        tiers.copy_newest_to_remote()
        assert tiers.remote_copy_failure is None
    assert copies(tmp_path / "there" / "run") == ["1"]


def test_checkpoint_stays_until_it_is_copied_and_only_the_newest_waits(
    tmp_path, here, slow_copy
):
    started, resume = slow_copy
    config = CheckpointConfig(
        every_steps=1, keep_last=1, remote_folder=str(tmp_path / "there")
    )
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        tiers.save(1, state_of(here, 1), {})
        assert started.wait(60)
        for step in range(2, 6):
            tiers.save(step, state_of(here, step), {})
        tiers.wait()
        assert {path.name for path in (tmp_path / "run").iterdir()} >= {"1", "5"}
        assert tiers.remote.steps_being_copied == [1, 5]
        resume.set()
        assert tiers.remote_copy_failure is None
        assert tiers.save(6, state_of(here, 6), {}) == "folder"
        tiers.wait()
        assert tiers.remote_copy_failure is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["6"]
    assert copies(tmp_path / "there" / "run") == ["6"]


def test_files_of_interrupted_copies_and_deletions_are_cleared_away(tmp_path, here):
    place = tmp_path / "there" / "run"
    (place / "3" / "state").mkdir(parents=True)
    (place / "3" / "state" / "d").write_text("half")
    (place / "4").mkdir()
    lock = "TensorStore's own, of a file being written"
    (place / "4" / "d.__lock").write_text(lock)
    config = CheckpointConfig(every_steps=1, remote_folder=str(tmp_path / "there"))
    write(tmp_path / "run", config, here, 5, 6)
    assert copies(place) == ["5", "6"]
    shutil.rmtree(tmp_path / "run" / "5" / "metadata")
    (tmp_path / "run" / "7.orbax-checkpoint-tmp").mkdir()
    chosen, _ = newest(tmp_path / "run", config, here)
    assert chosen == (6, "folder")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["6"]


def test_error_that_passes_hides_no_checkpoint(tmp_path, here, monkeypatch):
    write(tmp_path, CheckpointConfig(every_steps=10), here, 10, 20)
    read = Path.read_text
    failures = [OSError("Stale file handle")]

    def once(self, encoding=None, errors=None):
        if self.name == "metadata" and failures:
            raise failures.pop()
        return read(self, encoding, errors)

    monkeypatch.setattr(Path, "read_text", once)
    assert newest(tmp_path, CheckpointConfig(), here) == ((20, "folder"), [])
    assert failures == []


def test_checkpoints_after_a_rollback_replace_those_before_it(tmp_path, here):
    config = make_local_config(tmp_path, remote_folder=str(tmp_path / "there"))
    write(tmp_path / "run", config, here, 10, 20, 30, 36, 39)
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        candidates, _ = tiers.find()
        newer = [candidate for candidate in candidates if candidate.step > 20]
        skipped = [
            SkippedCheckpoint(candidate.step, candidate.tier, "left", is_damaged=False)
            for candidate in newer
        ]
        tiers.discard_skipped(skipped, 20)
        for step in (21, 24, 27, 30):
            tiers.save(step, state_of(here, step), {})
            tiers.wait()
        assert tiers.remote_copy_failure is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["20", "30"]
    assert copies(tmp_path / "there" / "run") == ["20", "30"]
    [process_folder] = (tmp_path / "disk").glob("run-*/process-0")
    names = sorted(path.name for path in process_folder.iterdir())
    assert names == ["24.safetensors", "27.safetensors"]


def test_last_good_checkpoint_stays_while_updates_are_suspect(tmp_path, here):
    config = CheckpointConfig(every_steps=1, keep_last=2)
    with Checkpointer(tmp_path, "run", config) as tiers:
        for step in range(2, 7):
            suspect = 4 if step >= 4 else None
            tiers.save(step, state_of(here, step), {}, first_suspect_step=suspect)
            tiers.wait()
        assert tiers.folder_tier.steps() == [3, 5, 6]
        tiers.save(7, state_of(here, 7), {})
        assert tiers.folder_tier.steps() == [6, 7]
