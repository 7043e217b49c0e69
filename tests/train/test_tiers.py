"""Checkpoints in several places: the newest that can be read is found, whatever others suffered."""

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

from maxlm.config import MaxlmError
from maxlm.train.checkpoint import Checkpointer, SkippedCheckpoint, reading
from maxlm.train.checkpoint.reading import Unreadable
from maxlm.train.checkpoint.remote import _Copier
from maxlm.train.config import CheckpointConfig

SPECS = {
    "embed": PartitionSpec("fsdp", "tensor"),
    "scale": PartitionSpec(),
    "up": PartitionSpec(None, "tensor"),
}
SHAPES = {"embed": (72, 30), "scale": (5,), "up": (3, 84)}


def state_of(mesh, step):
    random = np.random.default_rng(step)
    params = {
        name: jax.device_put(
            random.normal(size=shape).astype(np.float32), NamedSharding(mesh, SPECS[name])
        )
        for name, shape in SHAPES.items()
    }
    return {
        "params": params,
        "step": jax.device_put(np.int32(step), NamedSharding(mesh, PartitionSpec())),
    }


def abstract(mesh):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(mesh, 0)
    )


@pytest.fixture
def here(mesh):
    return mesh(fsdp=2, tensor=2)


def write(folder, mesh, *steps, forced=(), **config):
    """Checkpointer that saved these steps, closed."""
    with Checkpointer(folder, "run", CheckpointConfig(**config)) as tiers:
        for step in steps:
            tiers.save(step, state_of(mesh, step), {"config": {}}, force=step in forced)
            tiers.wait()
            assert tiers.missing_copy is None  # waits for the copy


def newest(folder, mesh, **config):
    """(step, tier) of what is restored, after checking it; what was skipped; the tiers."""
    with Checkpointer(folder, "run", CheckpointConfig(**config)) as tiers:
        found, skipped = tiers.find()
        state, chosen, more = tiers.restore_newest(found, abstract(mesh))
        if chosen is None:
            return None, [*skipped, *more]
        jax.tree.map(np.testing.assert_array_equal, state, state_of(mesh, chosen.step))
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(abstract(mesh)), strict=True):
            assert got.sharding == want.sharding
        tiers.quarantine([*skipped, *more], chosen.step)
        return (chosen.step, chosen.tier.name), [*skipped, *more]


def files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def copies(place):
    """Steps of which a folder of copies has files."""
    return sorted({path.relative_to(place).parts[0] for path in files(place)} - {"OWNER"})


def largest(folder):
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip_a_bit(folder):
    """In the middle of the array data."""
    path = largest(folder / "state")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = largest(folder / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete_a_shard(folder):
    largest(folder / "state").unlink()


def empty_metadata(folder):
    (folder / "metadata" / "metadata").write_text("")


def delete_state(folder):
    shutil.rmtree(folder / "state")


@pytest.mark.parametrize(
    "damage", [flip_a_bit, truncate, delete_a_shard, empty_metadata, delete_state]
)
def test_a_damaged_newest_checkpoint_is_skipped_and_said_to_be(tmp_path, here, damage):
    write(tmp_path, here, 10, 20, every_steps=10)
    damage(tmp_path / "20")
    chosen, skipped = newest(tmp_path, here)
    assert chosen == (10, "folder")
    [one] = skipped
    assert str(one).startswith("checkpoint 20 is skipped: unreadable")
    # It makes room for the step's next checkpoint, and is kept in case it can be repaired.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "20.damaged"]
    write(tmp_path, here, 20, every_steps=10)
    assert newest(tmp_path, here) == ((20, "folder"), [])


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path, here):
    """What is restored is compared with what was saved; some bytes hold nothing of the arrays."""
    write(tmp_path / "good", here, 10, every_steps=10)
    path = largest(tmp_path / "good" / "10" / "state")
    size, missed = path.stat().st_size, []
    random = np.random.default_rng(0)
    for place in random.integers(size, size=25):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        copy = tmp_path / "bad" / path.relative_to(tmp_path / "good")
        data = bytearray(copy.read_bytes())
        data[place] ^= 1 << int(random.integers(8))
        copy.write_bytes(data)
        chosen, _ = newest(tmp_path / "bad", here)  # checks what it restores
        missed += [int(place)] if chosen else []
        shutil.rmtree(tmp_path / "bad")
    assert len(missed) < 13  # or hardly any was looked at


def test_a_flipped_bit_beside_the_arrays_is_found_or_does_no_harm(tmp_path, here, monkeypatch):
    """In a sample of all files of a checkpoint but the arrays', in all places."""
    monkeypatch.setattr(reading, "_RETRY_SECONDS", ())
    places = {"local_folder": str(tmp_path / "disk"), "remote_folder": str(tmp_path / "there")}
    config = CheckpointConfig(every_steps=20, local_every_steps=10, **places)
    own = {"config": {"seed": 7, "rate": 1e-05}, "skipped_batches": [[3, 5]], "losses": None}
    random, seen = np.random.default_rng(0), Counter()
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        for step in (20, 30, 40, 50):  # the folder's and their copies, and local ones
            tiers.save(step, state_of(here, step), own)
            tiers.wait()
        assert tiers.missing_copy is None
        [local] = (tmp_path / "disk").glob("run-*/process-0/50.safetensors")
        remote = tmp_path / "there" / "run" / "40" / "metadata" / "metadata"
        beside = [path for path in files(tmp_path / "run" / "40") if path.parent.name != "d"]
        for path in (local, remote, *beside):
            good = path.read_bytes()
            end = good.index(b'}"}') if path is local else len(good)
            checked = path is local or path.name == "metadata"
            for place in random.integers(8 * end, size=150 if checked else 6):
                bad = bytearray(good)
                bad[place // 8] ^= 1 << int(place % 8)
                path.write_bytes(bad)
                found, skipped = tiers.find()
                for each in found:
                    assert {name: each.metadata.get(name) for name in own} == own, (path, place)
                if path is local or path.name == "metadata":
                    assert skipped or bad == good.replace(b"1e-05", b"1E-05"), (path, place)
                    assert all("is skipped: unreadable" in str(each) for each in skipped)
                else:
                    folder = [each for each in found if each.tier.name == "folder"]
                    state, chosen, _ = tiers.restore_newest(folder, abstract(here))
                    jax.tree.map(np.testing.assert_array_equal, state, state_of(here, chosen.step))
                    seen[chosen.step] += 1
            path.write_bytes(good)
    assert seen[20] > seen[40] / 4  # or hardly any was looked at


def test_an_interrupted_save_is_no_checkpoint(tmp_path, here):
    write(tmp_path, here, 10, 20, every_steps=10)
    (tmp_path / "20").rename(tmp_path / "20.orbax-checkpoint-tmp")
    assert newest(tmp_path, here) == ((10, "folder"), [])


def test_local_checkpoints_are_taken_in_between_and_the_two_newest_kept(tmp_path, here):
    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    write(tmp_path / "run", here, *range(1, 15), **config)
    [own] = (tmp_path / "disk").glob("run-*/process-0")
    assert sorted(path.name for path in own.glob("*.*")) == ["12.safetensors", "9.safetensors"]
    assert newest(tmp_path / "run", here, **config) == ((12, "local"), [])


def test_a_damaged_local_checkpoint_is_skipped_for_what_is_next(tmp_path, here):
    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    write(tmp_path / "run", here, *range(1, 14), **config)
    [newer] = (tmp_path / "disk").glob("run-*/process-0/12.safetensors")
    data = bytearray(newer.read_bytes())
    data[len(data) // 2] ^= 4
    newer.write_bytes(data)
    chosen, [skipped] = newest(tmp_path / "run", here, **config)
    assert chosen == (10, "folder")
    assert str(skipped) == (
        "local checkpoint 12 is skipped: unreadable: params.embed is not what was saved"
    )
    assert not newer.exists()


def test_a_local_checkpoint_of_another_mesh_is_skipped(tmp_path, here, mesh):
    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    write(tmp_path / "run", here, *range(1, 14), **config)
    chosen, [skipped] = newest(tmp_path / "run", mesh(fsdp=4), **config)
    assert chosen == (10, "folder")
    assert skipped.why == "unreadable (it was written on another mesh or by other processes)"


def test_time_asks_for_a_checkpoint_too(tmp_path, here):
    now = [0.0]
    config = CheckpointConfig(every_steps=0, every_minutes=2)
    with Checkpointer(tmp_path, "run", config, clock=lambda: now[0]) as tiers:
        assert not tiers.is_late()
        now[0] = 120.0
        assert tiers.is_late()
        assert tiers.save(7, state_of(here, 7), {}, force=True) == "folder"
        assert not tiers.is_late()
        assert tiers.save(8, state_of(here, 8), {}) is None
        assert tiers.save(7, state_of(here, 7), {}, force=True) is None  # there is one


def test_what_cannot_be_written_is_an_error(tmp_path, here):
    (tmp_path / "disk").write_text("")
    with pytest.raises(MaxlmError, match=r"disk.*: cannot write: "):
        Checkpointer(tmp_path / "run", "run", CheckpointConfig(local_folder=str(tmp_path / "disk")))


@pytest.fixture(scope="module")
def s3():
    """A bucket on a server of its own; the drivers read its address once."""
    reason = "needs an S3 server: pip install 'moto[server]'"
    server_module = pytest.importorskip("moto.server", reason=reason)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
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


def keys(client):
    return [each["Key"] for each in client.list_objects_v2(Bucket="models").get("Contents", [])]


def test_checkpoints_are_copied_to_a_bucket_and_found_there(tmp_path, here, s3):
    config = {"every_steps": 10, "keep_last": 2, "remote_folder": "s3://models/a"}
    write(tmp_path / "first", here, 10, 20, 30, **config)
    steps = {key.split("/")[2] for key in keys(s3) if "/run/" in key}
    assert steps == {"20", "30", "OWNER"}  # keep_last
    shutil.rmtree(tmp_path / "first")
    assert newest(tmp_path / "first", here, **config) == ((30, "remote"), [])
    assert not (tmp_path / "first" / ".fetched").exists()


def test_a_copy_that_is_incomplete_or_damaged_is_skipped(tmp_path, here, s3):
    config = {"every_steps": 10, "keep_last": 3, "remote_folder": "s3://models/b"}
    write(tmp_path / "first", here, 10, 20, 30, **config)
    own = [key for key in keys(s3) if key.startswith("b/run/")]
    size = {key: s3.head_object(Bucket="models", Key=key)["ContentLength"] for key in own}
    s3.delete_object(Bucket="models", Key="b/run/30/COMPLETE")
    data = max((key for key in own if "/20/" in key), key=size.__getitem__)
    body = bytearray(s3.get_object(Bucket="models", Key=data)["Body"].read())
    body[len(body) // 2] ^= 1
    s3.put_object(Bucket="models", Key=data, Body=bytes(body))
    shutil.rmtree(tmp_path / "first")
    chosen, skipped = newest(tmp_path / "first", here, **config)
    assert chosen == (10, "remote")
    assert [str(each) for each in skipped] == [
        f"remote checkpoint 20 is skipped: unreadable: {data.removeprefix('b/run/20/')} is damaged"
    ]


def test_the_run_s_own_folder_comes_before_a_copy_of_the_same_step(tmp_path, here, s3):
    config = {"every_steps": 10, "remote_folder": "s3://models/c"}
    write(tmp_path, here, 10, **config)
    assert newest(tmp_path, here, **config) == ((10, "folder"), [])
    flip_a_bit(tmp_path / "10")
    chosen, [skipped] = newest(tmp_path, here, **config)
    assert (chosen, skipped.tier.name) == ((10, "remote"), "folder")


def test_a_bucket_that_is_not_there_is_told_of_before_anything_is_trained(tmp_path, s3):
    with pytest.raises(MaxlmError) as error:
        Checkpointer(tmp_path, "run", CheckpointConfig(remote_folder="s3://nowhere/a"))
    assert str(error.value).startswith("s3://nowhere/a/run: cannot be reached (")
    assert str(error.value).endswith("; check the URL, the network and the credentials")
    assert "NoSuchBucket" in str(error.value)


def test_a_bucket_of_google_s(tmp_path, here):
    reason = "needs a server: pip install gcp-storage-emulator"
    server_module = pytest.importorskip("gcp_storage_emulator.server", reason=reason)
    server = server_module.create_server("127.0.0.1", 0, in_memory=True, default_bucket="models")
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            port = server._api._httpd.server_port
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
            patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
            config = {"every_steps": 10, "remote_folder": "gs://models/a"}
            write(tmp_path / "first", here, 10, 20, **config)
            shutil.rmtree(tmp_path / "first")
            assert newest(tmp_path / "first", here, **config) == ((20, "remote"), [])
    finally:
        server.stop()


def test_a_copy_that_fails_is_told_of_and_made_up_for(tmp_path, here, capfd):
    place = tmp_path / "elsewhere"
    config = {"every_steps": 1, "remote_folder": str(place)}
    with Checkpointer(tmp_path / "run", "run", CheckpointConfig(**config)) as tiers:
        (place / "run" / "1").write_text("in the way")
        tiers.save(1, state_of(here, 1), {})
        assert tiers.missing_copy.startswith(f"the last checkpoint is not in {place}/run: ")
    assert capfd.readouterr().err.startswith(f"checkpoint 1 was not copied to {place}/run: ")
    (place / "run" / "1").unlink()
    with Checkpointer(tmp_path / "run", "run", CheckpointConfig(**config)) as tiers:
        tiers.catch_up()
        assert tiers.missing_copy is None
    shutil.rmtree(tmp_path / "run")
    assert newest(tmp_path / "run", here, **config) == ((1, "remote"), [])


def test_an_older_copy_that_cannot_be_deleted_makes_the_new_one_none_the_less(
    tmp_path, here, monkeypatch, capfd
):
    def refused(*_):
        raise MaxlmError("cannot be reached (PERMISSION_DENIED)", where="there", fix="ask")

    place = tmp_path / "elsewhere"
    config = {"every_steps": 1, "keep_last": 1, "remote_folder": str(place)}
    with monkeypatch.context() as patch:
        patch.setattr(_Copier, "delete", refused)
        write(tmp_path / "run", here, 1, 2, **config)
    assert capfd.readouterr().err == (
        "older copies were not deleted: there: cannot be reached (PERMISSION_DENIED); ask\n"
    )
    assert copies(place / "run") == ["1", "2"]
    write(tmp_path / "run", here, 3, **config)
    assert copies(place / "run") == ["3"]


def test_copies_of_another_run_of_the_name_are_refused(tmp_path, here):
    place = tmp_path / "there" / "run"
    config = {"every_steps": 10, "remote_folder": str(tmp_path / "there")}
    write(tmp_path / "one", here, 10, **config)
    with pytest.raises(MaxlmError) as error:
        write(tmp_path / "two", here, 10, **config)
    assert str(error.value) == (
        f"{place}: holds the copies of the run in {tmp_path}/one, and this one is in "
        f"{tmp_path}/two; give this run another name=..., or delete the file OWNER there to take "
        "over what it holds"
    )
    (place / "OWNER").unlink()
    assert newest(tmp_path / "two", here, **config) == ((10, "remote"), [])


LEAVES = """
import sys, time
from pathlib import Path
from maxlm.train.checkpoint import Checkpointer
from maxlm.train.config import CheckpointConfig

folder = Path(sys.argv[1])
for number in range(3000):
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "1" / str(number)).write_bytes(bytes(1000))
config = CheckpointConfig(remote_folder=str(folder / "there"))
with Checkpointer(folder / "run", "run", config) as tiers:
    tiers._remote._copier.copy(folder / "1")
    while not list((folder / "there").glob("*/1/*")):
        time.sleep(0.001)
    assert tiers._remote.busy_steps
    sys.exit(75)
"""


def test_a_process_that_ends_while_a_copy_is_made_ends_with_its_own_code(tmp_path):
    """A thread in TensorStore at that time would abort it, mostly."""
    command = [sys.executable, "-c", LEAVES]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    each = [subprocess.Popen([*command, tmp_path / str(n)], env=environment) for n in range(3)]
    assert [process.wait(60) for process in each] == [75] * 3


def test_what_is_left_off_is_copied_later(tmp_path, here, monkeypatch):
    config = CheckpointConfig(every_steps=1, remote_folder=str(tmp_path / "there"))
    started, original = threading.Event(), _Copier._copy

    def slow(self, folder):
        started.set()
        self._cancelling.wait(30)
        original(self, folder)

    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        with monkeypatch.context() as patch:
            patch.setattr(_Copier, "_copy", slow)
            tiers.save(1, state_of(here, 1), {})
            assert started.wait(30)
            tiers.stop_copying()
        tiers.wait()
        assert copies(tmp_path / "there" / "run") == []
        tiers.catch_up()
        assert tiers.missing_copy is None
    assert copies(tmp_path / "there" / "run") == ["1"]


def test_files_of_processes_that_are_elsewhere_now_go_with_the_next_save(tmp_path, here):
    """Each start may give a host another number."""
    config = {"local_every_steps": 1, "local_folder": str(tmp_path / "disk")}
    write(tmp_path / "run", here, 1, **config)
    [own] = (tmp_path / "disk").glob("run-*/process-0")
    own.rename(own.with_name("process-3"))
    with Checkpointer(tmp_path / "run", "run", CheckpointConfig(**config)) as tiers:
        assert (own.with_name("process-3") / "1.safetensors").exists()
        tiers.save(2, state_of(here, 2), {})
        tiers.wait()
        assert [path.name for path in own.parent.iterdir()] == ["process-0"]
        tiers.clear_local()
        assert not own.parent.exists()


class Late:
    """A write whose result is there at the very moment in which a wait for it is given up."""

    def __init__(self, future):
        self._future, self._waits = future, 1

    def done(self):
        return self._waits == 0 and self._future.done()

    def result(self, timeout=None):
        value = self._future.result()  # raises the write's own error
        if self._waits and timeout is not None:
            self._waits -= 1
            raise TimeoutError
        return value


class LateStore:
    """A store that answers each of the named calls so."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        if name in ("write", "delete_range"):
            return lambda *given: Late(getattr(self._store, name)(*given))
        return getattr(self._store, name)


def test_a_result_that_comes_as_a_wait_for_it_ends_is_taken(tmp_path, here, capfd):
    config = CheckpointConfig(every_steps=1, keep_last=1, remote_folder=str(tmp_path / "there"))
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        copier = tiers._remote._copier
        copier._store = LateStore(copier._store)
        for step in (1, 2):
            tiers.save(step, state_of(here, step), {})
            tiers.wait()
            assert tiers.missing_copy is None
    assert capfd.readouterr().err == ""
    assert copies(tmp_path / "there" / "run") == ["2"]


def test_what_is_being_copied_stays_until_it_is(tmp_path, here, monkeypatch):
    started, go_on = threading.Event(), threading.Event()
    original = _Copier._copy

    def slow(self, folder):
        started.set()
        go_on.wait(30)
        original(self, folder)

    monkeypatch.setattr(_Copier, "_copy", slow)
    config = CheckpointConfig(every_steps=1, keep_last=1, remote_folder=str(tmp_path / "there"))
    with Checkpointer(tmp_path / "run", "run", config) as tiers:
        tiers.save(1, state_of(here, 1), {})
        started.wait(30)
        for step in range(2, 6):
            tiers.save(step, state_of(here, step), {})
        tiers.wait()
        assert {path.name for path in (tmp_path / "run").iterdir()} >= {"1", "5"}
        go_on.set()
        assert tiers.missing_copy is None
        assert tiers.save(6, state_of(here, 6), {}) == "folder"
        tiers.wait()
        assert tiers.missing_copy is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["6"]
    assert copies(tmp_path / "there" / "run") == ["6"]


def test_files_of_a_copy_that_was_cut_off_are_cleared_away(tmp_path, here):
    left = tmp_path / "there" / "run" / "3" / "state"
    left.mkdir(parents=True)
    (left / "d").write_text("half")
    (left.parents[1] / "4").mkdir()
    (left.parents[1] / "4" / "d.__lock").write_text("TensorStore's own, of a file being written")
    write(tmp_path / "run", here, 5, every_steps=1, remote_folder=str(tmp_path / "there"))
    assert copies(tmp_path / "there" / "run") == ["5"]


def test_an_error_that_passes_hides_no_checkpoint(tmp_path, here, monkeypatch):
    write(tmp_path, here, 10, 20, every_steps=10)
    read, failures = Path.read_text, [OSError("Stale file handle")]

    def once(self, *arguments, **more):
        if self.name == "metadata" and failures:
            raise failures.pop()
        return read(self, *arguments, **more)

    monkeypatch.setattr(Path, "read_text", once)
    assert newest(tmp_path, here) == ((20, "folder"), [])
    assert failures == []


def test_a_copy_that_cannot_be_read_is_not_deleted(tmp_path, here, monkeypatch):
    config = {"every_steps": 10, "remote_folder": str(tmp_path / "there")}
    write(tmp_path / "run", here, 10, 20, **config)
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:

        def refused(self, step, to):
            fix = "restore another step"
            if step == 20:
                raise Unreadable("connection reset", where="there", fix=fix)
            return original(self, step, to)

        original = _Copier.fetch
        patch.setattr(_Copier, "fetch", refused)
        assert newest(tmp_path / "run", here, **config)[0] == (10, "remote")
    assert newest(tmp_path / "run", here, **config)[0] == (20, "remote")


def test_a_local_checkpoint_that_cannot_be_written_is_told_of_and_no_more(
    tmp_path, here, monkeypatch, capfd
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", full)
        write(tmp_path / "run", here, *range(1, 14), **config)
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 4
    assert err[0].startswith(f"local checkpoint 3 was not written to {tmp_path}/disk/run-")
    assert "No space left on device" in err[0]
    assert err[0].endswith("; training continues")
    assert newest(tmp_path / "run", here, **config) == ((10, "folder"), [])


def test_runs_of_one_name_in_two_folders_share_a_disk(tmp_path, here):
    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    write(tmp_path / "one", here, *range(1, 14), **config)
    with Checkpointer(tmp_path / "two", "run", CheckpointConfig(**config)) as tiers:
        assert tiers.find() == ([], [])


def test_steps_of_a_path_that_was_left_do_not_crowd_out_new_ones(tmp_path, here):
    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    config |= {"remote_folder": str(tmp_path / "there")}
    write(tmp_path / "run", here, *range(1, 40), **config)
    with Checkpointer(tmp_path / "run", "run", CheckpointConfig(**config)) as tiers:
        found, _ = tiers.find()
        newer = [each for each in found if each.step > 20]
        left = [SkippedCheckpoint(f.step, f.tier, "left", is_damaged=False) for f in newer]
        tiers.quarantine(left, 20)
        for step in (21, 24, 27, 30):
            tiers.save(step, state_of(here, step), {})
            tiers.wait()
        assert tiers.missing_copy is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["20", "30"]
    assert copies(tmp_path / "there" / "run") == ["20", "30"]
    [own] = (tmp_path / "disk").glob("run-*/process-0")
    assert sorted(path.name for path in own.glob("*.*")) == ["24.safetensors", "27.safetensors"]


def test_while_numbers_may_be_bad_the_last_good_checkpoint_stays(tmp_path, here):
    config = CheckpointConfig(every_steps=1, keep_last=2)
    with Checkpointer(tmp_path, "run", config) as tiers:
        for step in range(1, 9):
            tiers.save(step, state_of(here, step), {}, suspect=4 if step >= 4 else None)
            tiers.wait()
        assert tiers._folder.steps() == [3, 7, 8]
        tiers.save(9, state_of(here, 9), {})
        assert tiers._folder.steps() == [8, 9]


def test_half_of_an_old_checkpoint_is_cleared_away(tmp_path, here):
    write(tmp_path, here, 10, 20, every_steps=10)
    shutil.rmtree(tmp_path / "10" / "metadata")
    assert newest(tmp_path, here)[0] == (20, "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["20"]


def test_what_a_killed_process_left_of_a_local_file_is_cleared_away(tmp_path, here):
    config = {"every_steps": 10, "local_folder": str(tmp_path / "disk"), "local_every_steps": 3}
    write(tmp_path / "run", here, 3, **config)
    [own] = (tmp_path / "disk").glob("run-*/process-0")
    with subprocess.Popen(["true"]) as ended:
        pass
    for name in (str(ended.pid), str(os.getpid()), "1"):
        (own / f".{name}").mkdir()
        (own / f".{name}" / ".tmpXy").write_text("half")
    with Checkpointer(tmp_path / "run", "run", CheckpointConfig(**config)) as tiers:
        assert sorted(path.name for path in own.iterdir()) == [".1", "3.safetensors", "start"]
        assert [each.step for each in tiers.find()[0]] == [3]
