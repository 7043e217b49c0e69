"""Runs of `maxlm train` that suffer what clusters do, with the lines that a person sees."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from maxlm.config import MaxlmError, load_config
from maxlm.programs.prepare import prepare
from maxlm.programs.run_folder import lock_run_folder
from maxlm.programs.runs import read_run
from maxlm.run import RunConfig
from tests.data.loader.test_prefetch import alive, wait_until, worker_pids
from tests.programs import tiny
from tests.programs.jobs import HERE, Jobs

STEPS = 24
RESUME = "run the same command to resume"
FULL = "No space left on device"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Runs on text that is prepared; ``one`` is trained without a fault, with a checkpoint each
    6 steps."""
    folder = tmp_path_factory.mktemp("faults")
    config = tiny.write_config(
        folder,
        tiny.write_text(folder / "text"),
        train={"steps": STEPS, "eval_every": 8},
        checkpoint={"every_steps": 6, "keep_last": 4},
        reporting={"tensorboard": False},
    )
    made = folder / "prepared"
    prepare(load_config(RunConfig, config, ["name=prepared"]).value, made)
    stores = {split: str(made / "data" / "text" / split) for split in ("train", "heldout")}
    source = {"name": "text", "store": stores["train"], "heldout_store": stores["heldout"]}
    started = Jobs(
        folder, config, f"data.sources={json.dumps([source])}", f"tokenizer.path={made}/tokenizer"
    )
    started.trained("one")
    yield started
    started.end()


@pytest.fixture
def full_disk(tmp_path):
    """A small disk of its own; ``fill(left)`` leaves so many bytes on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")

    def fill(left: int | None) -> None:
        ballast = disk / "ballast"
        ballast.unlink(missing_ok=True)
        if left is not None:
            free = os.statvfs(disk)
            ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - left)))

    yield disk, fill
    subprocess.run(["umount", "-l", disk], check=True)


def checkpoints(jobs, name):
    return jobs.folder / name / "checkpoints"


def largest(folder: Path) -> Path:
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoints_are_passed_over_one_by_one_and_never_begun_anew_from(jobs):
    run, home = jobs.folder / "damaged", checkpoints(jobs, "damaged")
    shutil.copytree(jobs.folder / "one", run)
    flip(largest(home / "24" / "state"))
    cut = largest(home / "18" / "state")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    largest(home / "12" / "state").unlink()
    said = jobs.trained("damaged")
    assert [line.split(": ")[0] for line in said[:3]] == [
        f"checkpoint {step} is skipped" for step in (24, 18, 12)
    ]
    assert said[3] == f"resuming from step 6 in {home}"
    assert jobs.results("damaged") == jobs.results("one")
    names = {path.name for path in home.iterdir() if path.is_dir()}
    assert names == {"6", "12", "12.damaged", "18", "18.damaged", "24", "24.damaged"}
    [resumed] = jobs.events("damaged", "resume")
    assert [step for step, _ in resumed["skipped"]] == [24, 18, 12]

    for step in (6, 12, 18, 24):
        shutil.rmtree(home / str(step) / "state")
    before = (run / "metrics.jsonl").read_bytes()
    [process] = jobs.train("damaged")
    code, _, err = process.ended()
    assert code == 2
    assert err[-1].startswith(f"error: {home}: no checkpoint can be resumed from: checkpoint 24 is")
    assert err[-1].endswith(
        f"; repair one; to start afresh, move {run} away, or set another name=..."
    )
    assert (run / "metrics.jsonl").read_bytes() == before


def steps_in(folder: Path) -> set[int]:
    """Of complete checkpoints: folders, or files on a host's own disk."""
    names = (path.name.removesuffix(".safetensors") for path in folder.iterdir())
    return {int(name) for name in names if name.isdigit()}


def disk_of(jobs, local_folder: Path, name: str, process: int = 0) -> Path:
    """Where a process keeps its files: runs of one name in two folders share none."""
    own = hashlib.sha256(str(checkpoints(jobs, name)).encode()).hexdigest()[:8]
    return local_folder / f"{name}-{own}" / f"process-{process}"


def as_if_saved_elsewhere(path: Path) -> None:
    """Let a local file be of a save of other arrays than it was."""
    with safe_open(path, "np") as file:
        keys, header = file.keys(), file.metadata()
        arrays = {key: file.get_tensor(key) for key in keys}
    metadata = json.loads(header["metadata"])
    del metadata["sha256"], metadata["versions"]  # as an older version would
    metadata["fingerprints"] = {name: int(x) + 1 for name, x in metadata["fingerprints"].items()}
    save_file(arrays, path, header | {"metadata": json.dumps(metadata)})


def test_hosts_go_on_from_their_disks_and_from_the_folder_when_one_has_lost_its(jobs, tmp_path):
    own = ["checkpoint.every_steps=10", "checkpoint.local_every_steps=4", "faults.peer_seconds=10"]
    own += [f"checkpoint.local_folder={tmp_path}/fast", "mesh={data: 2, fsdp: 1}"]
    disks = [disk_of(jobs, tmp_path / "fast", "locals", number) for number in range(2)]
    home = checkpoints(jobs, "locals")

    def killed(victim, step):
        """Kill one process after a step is on all disks; what the other said."""
        processes = jobs.train("locals", *own, processes=2, faults={0: ("slow", 4), 1: ("slow", 4)})
        for disk, process in zip(disks, processes, strict=True):
            process.until((disk / f"{step}.safetensors").exists)
        processes[victim].send(signal.SIGKILL)
        code, said, err = processes[1 - victim].ended()
        state = "the state is that of the last checkpoint"
        words = f"error: process {victim} ({HERE}) is gone; {state}"
        assert (code, any(words in line for line in err)) == (76, True)  # JAX may write beside it
        return [line for line in said if "skipped" in line or "resuming" in line]

    killed(0, 8)
    newest = max(steps_in(disks[0]) & steps_in(disks[1]))
    assert killed(1, 16) == [f"resuming from step {newest} in {disks[0]}"]
    # One host is back from elsewhere: it has lost a file, and keeps one of the run's other path.
    folder, lost = max(steps_in(home)), steps_in(disks[0])
    newest = max(lost & steps_in(disks[1]))
    for path in disks[1].glob("*.safetensors"):
        if path.stem == str(newest):
            as_if_saved_elsewhere(path)
        else:
            path.unlink()
    said = jobs.trained("locals", *own, processes=2)
    why = dict.fromkeys(lost, "process 1 has none") | {newest: "its files are not of one save"}
    assert [line for line in said if "skipped" in line or "resuming" in line] == [
        *(
            f"local checkpoint {step} is skipped: {why[step]}"
            for step in sorted(lost, reverse=True)
            if step >= folder
        ),
        f"resuming from step {folder} in {home}",
    ]
    assert newest > folder
    for (step, got), (same, want) in zip(jobs.results("locals"), jobs.results("one"), strict=True):
        assert step == same
        assert got == pytest.approx(want, rel=1e-4)


def test_where_hosts_disks_alone_have_checkpoints_of_another_mesh_a_run_begins_anew(jobs, tmp_path):
    own = [f"checkpoint.local_folder={tmp_path}/fast", "checkpoint.every_steps=0"]
    own += ["checkpoint.local_every_steps=4"]
    disk = disk_of(jobs, tmp_path / "fast", "moved")
    [process] = jobs.train("moved", *own, "mesh.fsdp=2", devices=2, faults={0: ("slow", 0)})
    process.until((disk / "8.safetensors").exists)
    process.send(signal.SIGKILL)
    process.ended()
    said = jobs.trained("moved", *own)
    other = "it was written on another mesh or by other processes"
    assert said[:2] == [
        f"local checkpoint {step} is skipped: unreadable ({other})" for step in (8, 4)
    ]
    assert not [line for line in said if "resuming" in line]
    assert jobs.results("moved") == jobs.results("one")
    assert not disk.parent.exists()  # it is done


def test_a_run_whose_folder_is_gone_goes_on_from_a_bucket(jobs):
    reason = "needs an S3 server: pip install 'moto[server]'"
    server_module = pytest.importorskip("moto.server", reason=reason)
    boto3 = pytest.importorskip("boto3", reason=reason)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    copied = "checkpoint.remote_folder=s3://models/a"
    try:
        client = boto3.client(
            "s3",
            region_name="us-east-1",
            endpoint_url=keys["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        )
        client.create_bucket(Bucket="models")
        jobs.trained("remote", copied, "train.steps=12", environment=keys)
        shutil.rmtree(jobs.folder / "remote")
        said = jobs.trained("remote", copied, environment=keys)
    finally:
        server.stop()
    assert said[0] == "resuming from step 12 in s3://models/a/remote"
    assert jobs.results("remote") == [each for each in jobs.results("one") if each[0] > 12]

    [process] = jobs.train("remote", copied, environment=keys)
    code, _, err = process.ended()
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("error: s3://models/a/remote: cannot be reached (")
    assert err[0].endswith("; check the URL, the network and the credentials")


def test_a_run_that_is_told_to_stop_at_any_time_goes_on_to_the_same_end(jobs):
    run = jobs.folder / "told"

    def stops(processes, words):
        [process] = processes
        code, _, err = process.ended()
        assert code == 75
        assert err[-1] == f"error: {run}: preempted at {words} of {STEPS}, which is saved; {RESUME}"
        assert not [line for line in err if "Traceback" in line]

    # Before the first step is compiled; in the evaluation at step 8; between two steps. What is
    # wanted at a step is known to all processes when the next is under way, with which it ends.
    stops(jobs.train("told", faults={0: ("SIGTERM", 0)}), "step 2")
    stops(jobs.train("told", faults={0: ("SIGUSR1", "evaluation")}), "step 10")
    [process] = jobs.train("told", faults={0: ("slow", 0)})
    process.until(lambda: jobs.step("told") >= 13)
    process.send(signal.SIGTERM)
    process.ended()
    stopped = jobs.step("told")
    stops([process], f"step {stopped}")
    assert 13 <= stopped < STEPS
    # In the last step, which the loop ends with.
    [process] = jobs.train("told", faults={0: ("SIGTERM", STEPS - 1)})
    code, said, err = process.ended()
    words = "preempted (SIGTERM) while no step was under way"
    assert (code, err[-1]) == (75, f"error: {run}: {words}; run the same command to resume")
    assert said[0] == f"resuming from step {stopped} in {run / 'checkpoints'}"
    assert jobs.trained("told")[0] == f"resuming from step {STEPS} in {run / 'checkpoints'}"
    assert jobs.results("told") == jobs.results("one")
    assert read_run(run).history.interruptions == {"preempted": 4}


def test_two_processes_end_together_if_one_is_told_to_or_hangs_and_go_on_to_the_same_end(jobs):
    jobs.trained("both", devices=2)
    run = jobs.folder / "pair"
    processes = jobs.train("pair", processes=2, faults={0: ("slow", 0), 1: ("slow", 0)})
    processes[0].until(lambda: jobs.step("pair") >= 3)
    processes[1].send(signal.SIGTERM)
    ended = [process.ended() for process in processes]
    words = f"preempted at step {jobs.step('pair')} of {STEPS}, which is saved; {RESUME}"
    assert [(code, err[-1]) for code, _, err in ended] == [(75, f"error: {run}: {words}")] * 2

    # One hangs: both say where they are, also the one that finds it later.
    hasty = ["faults.hang_seconds=16", "faults.hang_factor=2"]
    faults = {0: ("hang", 18), 1: ("slow", 0)}
    ended = [process.ended() for process in jobs.train("pair", *hasty, processes=2, faults=faults)]
    for number, (code, _, err) in enumerate(ended):
        [line] = [line for line in err if f"process {number} hangs" in line]
        assert code == 76
        [path] = (run / "hangs").glob(f"process-{number}-step-*.txt")
        step = path.stem.rpartition("-")[2]
        start, _, rest = line.partition(" s is the median) has taken ")
        assert start.startswith(f"error: {run}: process {number} hangs: step {step} (")
        seconds, _, rest = rest.partition(" s; ")
        assert 16 <= float(seconds) < 3600  # not idle_seconds
        assert rest == (
            f"what its threads were doing is in {path}; run the same command to resume from the "
            "last checkpoint"
        )
        assert ("a_place_to_hang" if number == 0 else "_finish_step") in path.read_text()
    assert read_run(run).history.counts["hang"] == 1

    jobs.trained("pair", processes=2)
    assert jobs.results("pair") == jobs.results("both")


def test_hosts_whose_settings_differ_are_told_which_settings(jobs):
    own = {1: ["data.batch_size=4", "train.eval_every=9"]}
    line = (
        f"error: hosts disagree on data.batch_size: 8 on process 0 ({HERE}); 4 on process 1 "
        f"({HERE}); and on train.eval_every; start all hosts with the same software, config and "
        "kind of machine"
    )
    ended = [process.ended() for process in jobs.train("differ", processes=2, own=own)]
    assert [(code, err) for code, _, err in ended] == [(2, [line])] * 2


def test_a_killed_loader_worker_ends_all_hosts_with_one_line_each(jobs):
    slow = {0: ("slow", 0), 1: ("slow", 0)}
    processes = jobs.train("worker", "data.workers=1", "train.steps=150", processes=2, faults=slow)
    processes[1].until(lambda: jobs.step("worker") > 1, seconds=400)
    workers = [worker_pids(process.id) for process in processes]
    assert [len(pids) for pids in workers] == [1, 1]
    os.kill(workers[1].pop(), signal.SIGKILL)
    line = (
        "data.workers: a loader worker was killed by signal 9 (Killed), probably out of memory; "
        "run the same command to go on from the last checkpoint, with fewer data.workers or more "
        "memory if it happens again"
    )
    said = [f"error: process 1 ({HERE}): {line}", f"error: {line}"]
    for process, text in zip(processes, said, strict=True):
        code, _, err = process.ended()
        # JAX's own words may come behind it.
        assert (code, err.count(text)) == (76, 1), err
        assert not [each for each in err if "Traceback" in each]
    wait_until(lambda: not any(map(alive, workers[0] | workers[1])))


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(jobs):
    [first] = jobs.train("held", faults={0: ("slow", 0)})
    first.until(lambda: jobs.step("held") >= 2)
    first.send(signal.SIGSTOP)  # it lives until the second has been there
    [second] = jobs.train("held")
    code, _, err = second.ended()
    first.send(signal.SIGCONT)
    assert code == 2
    assert err == [
        f"error: {jobs.folder / 'held'}: another run writes to this folder (process {first.id} on "
        f"{HERE}); wait for it to end, stop it, or give this one another name=..."
    ]
    assert first.ended()[0] == 0
    assert jobs.results("held") == jobs.results("one")


def test_a_folder_that_is_deleted_under_the_run_ends_it_and_does_not_reappear(jobs):
    run = jobs.folder / "deleted"
    [process] = jobs.train("deleted", faults={0: ("slow", 0)})
    process.until(lambda: (run / "checkpoints" / "6").is_dir() and jobs.step("deleted") >= 7)
    shutil.rmtree(run)
    code, _, err = process.ended()
    assert (code, run.exists()) == (2, False)
    assert err[-1] == (
        f"error: {run}: this folder, or a file of the run's in it, was deleted or moved during the "
        "run; put the run's folder back and run the same command to resume, or set another "
        "name=... to start afresh"
    )

    def read_data() -> None:
        with lock_run_folder(run):
            shutil.rmtree(run)
            raise OSError("chunk {0} is missing")

    with pytest.raises(MaxlmError, match="deleted: this folder, or a file of the run's in it, was"):
        read_data()


def test_a_folder_that_cannot_be_written(jobs, full_disk):
    disk, _ = full_disk
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    [process] = jobs.train("x", f"folder={disk}")
    code, _, err = process.ended()
    assert (code, err) == (
        2,
        [
            f"error: {disk}/x: cannot write the run folder (Read-only file system); set "
            "folder=PATH to a place you may write to"
        ],
    )


def test_a_disk_that_fills_up_costs_no_checkpoint(jobs, full_disk):
    disk, fill = full_disk
    here = jobs.elsewhere(disk)
    here.trained("full", "train.steps=6")
    home = checkpoints(here, "full")

    fill(150_000)  # enough for all but a checkpoint
    [process] = here.train("full")
    code, _, err = process.ended()
    assert code == 2
    assert [line for line in err if not line.startswith(("step ", "error: "))] == []
    assert err[-1].startswith(f"error: {home}: a checkpoint was not written (")
    assert err[-1].endswith(f"{FULL}); free some space or rights, resume")

    fill(None)
    [process] = here.train("full", "checkpoint.every_steps=0", faults={0: ("slow", 0)})
    process.until(lambda: here.events("full", "resume")[1:] and here.step("full") >= 8)
    fill(0)
    code, said, err = process.ended()
    assert (code, said[0]) == (2, f"resuming from step 6 in {home}")
    fix = f"cannot write: {FULL}; free some disk space, or check the folder and its permissions"
    assert err[-1] == f"error: {disk}/full/metrics.jsonl: {fix}"
    fill(0)
    [process] = here.train("full")  # the first file that does not fit depends on the file system
    code, _, err = process.ended()
    assert (code, len(err)) == (2, 1), err
    assert err[0].startswith(f"error: {disk}/full/")
    assert err[0].endswith(f": {fix}")

    fill(None)
    assert here.trained("full")[0] == f"resuming from step 6 in {home}"
    results = [each for each in here.results("full") if each[0] != 6 or "loss" in each[1]]
    assert results == jobs.results("one")  # but for the evaluation at what was the end


def test_a_disk_that_fills_up_ends_all_hosts_alike(jobs, full_disk):
    disk, fill = full_disk
    here = jobs.elsewhere(disk)
    here.trained("pair", "train.steps=6", processes=2)
    home = checkpoints(here, "pair")

    def ended(processes, start):
        """With the same code and line, of which one host says whose it is."""
        for code, _, err in [process.ended() for process in processes]:
            assert (code, [line for line in err if "Traceback" in line]) == (2, []), err
            assert err[-1].startswith(f"error: {start}") or f"): {start}" in err[-1], err
            assert FULL in err[-1]

    fill(150_000)
    start = f"{home}: a checkpoint was not written ("
    ended(here.train("pair", processes=2), start)
    fill(None)
    slow = {0: ("slow", 0), 1: ("slow", 0)}
    processes = here.train("pair", "checkpoint.every_steps=0", processes=2, faults=slow)
    processes[0].until(lambda: here.events("pair", "resume")[1:] and here.step("pair") >= 8)
    fill(0)
    ended(processes, f"{disk}/pair/metrics.jsonl: cannot write: ")
    fill(None)
    assert f"resuming from step 6 in {home}" in here.trained("pair", processes=2)


def test_a_fast_disk_that_fills_up_is_told_of_and_training_goes_on(jobs, full_disk):
    disk, fill = full_disk
    fill(200_000)
    own = [f"checkpoint.local_folder={disk}", "checkpoint.local_every_steps=4"]
    [process] = jobs.train("small", *own)
    code, _, err = process.ended()
    assert code == 0, err
    place = disk_of(jobs, disk, "small")
    assert [line for line in err if "local" in line] == [
        f"local checkpoint {step} was not written to {place} (Error while serializing: I/O error: "
        f"{FULL} (os error 28)); training continues"
        for step in (4, 8, 16, 20)
    ]
    assert jobs.results("small") == jobs.results("one")
