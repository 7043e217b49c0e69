"""Runs of `maxlm train` that suffer what machines do, with the lines that a person
sees. Runs of several processes: test_processes."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.run import setup
from maxlm.train.heldout import HeldOutEvaluator
from maxlm.train.run_folder import lock_run_folder
from maxlm.train.runs import read_run
from tests.train import tiny
from tests.train.jobs import HERE
from tests.train.tiny import read_events, read_results

pytestmark = pytest.mark.heavy

STEPS = 18
RESUME = "run the same command to resume"
FULL = "No space left on device"


class Runs:
    """Trains runs on text that is prepared, in this process, as `maxlm train` does."""

    def __init__(self, config: str, folder: Path, capfd):
        self.config = config
        self.folder = folder
        self._capfd = capfd

    def train(self, name: str, *settings: str, folder: Path | None = None):
        """The exit code, and the lines on stdout and on stderr."""
        self._capfd.readouterr()
        where = [f"folder={folder or self.folder}", f"name={name}"]
        code = main(["train", self.config, *where, *settings])
        out, err = self._capfd.readouterr()
        return code, out.splitlines(), err.splitlines()

    def trained(
        self, name: str, *settings: str, folder: Path | None = None
    ) -> list[str]:
        code, out, err = self.train(name, *settings, folder=folder)
        assert code == 0, err
        return out

    def check_same(self, name: str, folder: Path | None = None) -> None:
        """A run ended like the one without a fault."""
        results = read_results((folder or self.folder) / name)
        assert results == read_results(self.folder / "one")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    prepared = tiny.prepare(folder / "prepared")
    [source] = prepared["data"]["sources"]
    source["heldout_store"] = str(folder / "prepared/data/text/heldout")
    return tiny.write_config(
        folder,
        "",
        **prepared,
        train={"steps": STEPS, "eval_every": 8},
        checkpoint={"every_steps": 6, "keep_last": 3},
        reporting={"tensorboard": False},
    )


@pytest.fixture
def runs(config, capfd, compiled_once):
    """Where ``one`` has been trained without a fault, with checkpoints at 6, 12 and
    18."""
    runs = Runs(config, Path(config).parent, capfd)
    if not (runs.folder / "one").exists():
        runs.trained("one")
    return runs


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk: Path, left: int | None) -> None:
    """Leave so many bytes on a disk; None: all."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    if left is not None:
        status = os.statvfs(disk)
        free = status.f_bavail * status.f_bsize
        ballast.write_bytes(bytes(max(0, free - left)))


def at_batch(monkeypatch, batch_number: int, do) -> None:
    """Call a function before a batch of a run is trained on."""

    def change(number, batch):
        if number == batch_number:
            do()
        return batch

    tiny.spoil_batches(monkeypatch, change)


def record_stop_requests(monkeypatch) -> list:
    """How each loader of a run is told of a stop, by which it waits for no worker that
    starts."""
    requests = []
    load = setup.load_batches

    def load_batches(
        source, rows, *, start_step, num_steps, workers, prefetch, is_stop_requested
    ):
        requests.append(is_stop_requested)
        return load(
            source,
            rows,
            start_step=start_step,
            num_steps=num_steps,
            workers=workers,
            prefetch=prefetch,
            is_stop_requested=is_stop_requested,
        )

    monkeypatch.setattr(setup, "load_batches", load_batches)
    return requests


def largest(folder: Path) -> Path:
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def as_of_another_mesh(path: Path) -> None:
    """Let a local file hold other shards, which spares compiling for another mesh."""
    with safe_open(path, "np") as file:
        keys = file.keys()
        header = file.metadata()
        arrays = {f"{key},0:1": file.get_tensor(key) for key in keys}
    save_file(arrays, path, header)


@pytest.mark.more
def test_damaged_checkpoints_are_passed_over_one_by_one_and_never_begun_anew_from(runs):
    run = runs.folder / "damaged"
    home = run / "checkpoints"
    shutil.copytree(runs.folder / "one", run)
    flipped = largest(home / "18" / "state")
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut = largest(home / "12" / "state")
    os.truncate(cut, cut.stat().st_size // 2)
    out = runs.trained("damaged")
    assert [line.split(": ")[0] for line in out[:2]] == [
        f"checkpoint {step} is skipped" for step in (18, 12)
    ]
    assert out[2] == f"resuming from step 6 in {home}"
    runs.check_same("damaged")
    names = {path.name for path in home.iterdir() if path.is_dir()}
    assert names == {"6", "12", "12.damaged", "18", "18.damaged"}
    [resumed] = read_events(run, "resume")
    assert [step for step, _ in resumed["skipped"]] == [18, 12]

    for step in (6, 12, 18):
        shutil.rmtree(home / str(step) / "state")
    before = (run / "metrics.jsonl").read_bytes()
    code, _, err = runs.train("damaged")
    assert code == 2
    assert err[-1].startswith(
        f"error: {home}: no checkpoint can be resumed from: checkpoint 18 is"
    )
    assert err[-1].endswith(
        f"; repair one; to start afresh, move {run} away, or set another name=..."
    )
    assert (run / "metrics.jsonl").read_bytes() == before


LOST_EVENTS = {
    "lost": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(
        path.read_bytes().splitlines(keepends=True)[0]
    ),
    "torn": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "garbled": lambda path: path.write_bytes(
        bytes(99) + b'\n{"step": 3}\n' + b"[" * 5000 + b"\n"
    ),
}


@pytest.mark.more
def test_a_run_whose_events_are_lost_goes_on_from_its_checkpoints(runs):
    for kind in ("lost", "garbled"):
        run = shutil.copytree(runs.folder / "one", runs.folder / f"events_{kind}")
        LOST_EVENTS[kind](run / "events.jsonl")
        shutil.rmtree(run / "checkpoints/18")
        out = runs.trained(run.name)
        assert out[0] == f"resuming from step 12 in {run}/checkpoints"
        runs.check_same(run.name)


@pytest.mark.parametrize("kind", LOST_EVENTS)
def test_a_run_whose_events_and_checkpoints_are_lost_is_not_begun_anew(runs, kind):
    run = shutil.copytree(runs.folder / "one", runs.folder / f"all_{kind}")
    LOST_EVENTS[kind](run / "events.jsonl")
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.glob("*.jsonl")}
    code, _, err = runs.train(run.name)
    assert code == 2
    assert err[-1] == (
        f"error: {run}/checkpoints: no checkpoint is left, events.jsonl is lost or cut "
        "short, and metrics.jsonl has records up to step 18; put both back; to start "
        f"afresh, move {run} away, or set another name=..."
    )
    assert {path: path.read_bytes() for path in run.glob("*.jsonl")} == before


def test_a_newest_checkpoint_that_is_gone_is_told_of(runs):
    run = shutil.copytree(runs.folder / "one", runs.folder / "newest_gone")
    shutil.rmtree(run / "checkpoints/18")
    out = runs.trained(run.name)
    assert out[:2] == [
        "checkpoint 18 is gone: events.jsonl says that it was saved, and none of the "
        "run's places has it; the 6 steps since step 12 are trained again",
        f"resuming from step 12 in {run}/checkpoints",
    ]
    runs.check_same(run.name)


@pytest.mark.more
def test_where_hosts_disks_alone_have_checkpoints_of_another_mesh_a_run_begins_anew(
    runs, tmp_path, monkeypatch
):
    settings = [
        f"checkpoint.local_folder={tmp_path}/fast",
        "checkpoint.every_steps=0",
        "checkpoint.local_every_steps=4",
    ]
    home = runs.folder / "moved" / "checkpoints"
    digest = hashlib.sha256(str(home).encode()).hexdigest()
    place = f"moved-{digest[:8]}"
    with monkeypatch.context() as patch:
        at_batch(patch, 10, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.train("moved", *settings, "mesh={fsdp: 8}")
    saved = sorted((tmp_path / "fast" / place / "process-0").iterdir())
    assert [path.name for path in saved] == ["4.safetensors", "8.safetensors"]
    for path in saved:
        as_of_another_mesh(path)
    out = runs.trained("moved", *settings)
    other = "it was written on another mesh or by other processes"
    assert out[:2] == [
        f"local checkpoint {step} is skipped: unreadable ({other})" for step in (8, 4)
    ]
    assert not [line for line in out if "resuming" in line]
    runs.check_same("moved")
    assert not (tmp_path / "fast" / place).exists()  # it is done


def test_a_run_that_is_told_to_stop_at_any_time_goes_on_to_the_same_end(
    runs, monkeypatch
):
    run = runs.folder / "told"

    def stops(expected, words):
        code, _, err = runs.train("told")
        assert code == expected
        assert err[-1] == f"error: {run}: {words}"
        assert not [line for line in err if "Traceback" in line]

    # Before the first step is compiled, and in the evaluation at step 8. What is wanted
    # at a step is known to all processes when the next is under way, with which it
    # ends.
    with monkeypatch.context() as patch:
        requests = record_stop_requests(patch)
        at_batch(patch, 0, lambda: signal.raise_signal(signal.SIGINT))
        stops(2, f"interrupted at step 2 of {STEPS}, which is saved; {RESUME}")
        assert [is_stop_requested() for is_stop_requested in requests] == [True]
    with monkeypatch.context() as patch:
        evaluate = HeldOutEvaluator.evaluate_metrics

        def preempt_and_evaluate(*arguments):
            signal.raise_signal(signal.SIGUSR1)
            return evaluate(*arguments)

        patch.setattr(HeldOutEvaluator, "evaluate_metrics", preempt_and_evaluate)
        stops(75, f"preempted at step 10 of {STEPS}, which is saved; {RESUME}")
    with monkeypatch.context() as patch:  # In the last step, which the loop ends with.
        at_batch(patch, STEPS - 1, lambda: signal.raise_signal(signal.SIGTERM))
        stops(75, f"preempted (SIGTERM) while no step was under way; {RESUME}")
    # Finished, it has nothing left to do, and nothing is written down twice.
    for _ in range(2):
        out = runs.trained("told")
        assert out[0] == f"resuming from step {STEPS} in {run / 'checkpoints'}"
        runs.check_same("told")
    resumed = [event["step"] for event in read_events(run, "resume")]
    assert resumed == [2, 10, STEPS, STEPS]
    assert read_run(run).history.interruptions == {"preempted": 2, "interrupt": 1}


def test_a_second_run_in_the_same_folder_is_refused(runs):
    with lock_run_folder(runs.folder / "held"):
        code, _, err = runs.train("held")
    assert code == 2
    assert err == [
        f"error: {runs.folder / 'held'}: another run writes to this folder (process "
        f"{os.getpid()} on {HERE}); wait for it to end, stop it, or give this one "
        "another name=..."
    ]


@pytest.mark.more
def test_a_folder_that_is_deleted_under_the_run_ends_it_and_its_copy_is_gone_on_from(
    runs, tmp_path, monkeypatch
):
    run = runs.folder / "deleted"
    copies = tmp_path / "there"
    copied = f"checkpoint.remote_folder={copies}"

    def delete() -> None:
        while not (copies / "deleted" / "6" / "COMPLETE").exists():
            time.sleep(0.01)
        shutil.rmtree(run)

    with monkeypatch.context() as patch:
        at_batch(patch, 9, delete)
        code, _, err = runs.train("deleted", copied)
    assert code == 2
    assert not run.exists()  # it does not reappear
    assert err[-1] == (
        f"error: {run}: this folder, or a file of the run's in it, was deleted or "
        "moved during the run; put the run's folder back and run the same command to "
        "resume, or set another name=... to start afresh"
    )
    out = runs.trained("deleted", copied)
    assert out[0] == f"resuming from step 6 in {copies}/deleted"
    unbroken = read_results(runs.folder / "one")
    assert read_results(run) == [
        (step, values) for step, values in unbroken if step > 6
    ]

    def read_data() -> None:
        with lock_run_folder(run):
            shutil.rmtree(run)
            raise OSError("chunk {0} is missing")

    with pytest.raises(
        MaxlmError, match="deleted: this folder, or a file of the run's in it, was"
    ):
        read_data()


def test_a_folder_that_cannot_be_written(runs, disk):
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, _, err = runs.train("x", folder=disk)
    assert code == 2
    assert err == [
        f"error: {disk}/x: cannot write the run folder (Read-only file system); "
        "set folder=PATH to a place you may write to"
    ]


@pytest.mark.more
def test_a_disk_that_fills_up_costs_no_checkpoint(runs, disk, monkeypatch):
    home = shutil.copytree(runs.folder / "one", disk / "full") / "checkpoints"
    for step in (12, 18):  # as if it had been killed before them
        shutil.rmtree(home / str(step))

    fill(disk, 150_000)  # enough for all but a checkpoint
    code, _, err = runs.train("full", folder=disk)
    assert code == 2
    assert [line for line in err if not line.startswith(("step ", "error: "))] == []
    assert err[-1].startswith(f"error: {home}: a checkpoint was not written (")
    assert err[-1].endswith(f"{FULL}); free disk space or fix permissions, then rerun")

    fill(disk, None)
    with monkeypatch.context() as patch:
        at_batch(patch, 9, lambda: fill(disk, 0))
        code, out, err = runs.train("full", "checkpoint.every_steps=0", folder=disk)
    assert code == 2
    assert out[0] == f"resuming from step 6 in {home}"
    fix = f"cannot write: {FULL}; free some disk space, or check the folder and its permissions"
    assert err[-1] == f"error: {disk}/full/metrics.jsonl: {fix}"
    fill(disk, 0)
    code, _, [line] = runs.train("full", folder=disk)
    assert code == 2
    assert line.startswith(f"error: {disk}/full/")  # which file: as the disk has it
    assert line.endswith(f": {fix}")

    fill(disk, None)
    assert runs.trained("full", folder=disk)[0] == f"resuming from step 6 in {home}"
    runs.check_same("full", disk)


def test_a_fast_disk_that_fills_up_is_told_of_and_training_goes_on(runs, disk):
    fill(disk, 200_000)
    settings = [f"checkpoint.local_folder={disk}", "checkpoint.local_every_steps=8"]
    code, _, err = runs.train("small", *settings, "checkpoint.every_steps=0")
    assert code == 0, err
    warnings = [line for line in err if "local" in line]
    reason = f"Error while serializing: I/O error: {FULL} (os error 28)"
    for step, warning in zip((8, 16), warnings, strict=True):
        assert warning.startswith(f"local checkpoint {step} was not written to ")
        assert warning.endswith(f" ({reason}); training continues")
    runs.check_same("small")
