"""Runs of `maxlm train` on several processes that are stopped, killed and moved to
other meshes."""

import hashlib
import json
import os
import shutil
import signal
from pathlib import Path

import jax
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from maxlm.config import MaxlmError
from maxlm.run.config import RunConfig
from maxlm.run.setup import set_up_run
from maxlm.train.runs import read_run
from tests.data.loader.test_prefetch import alive, wait_until, worker_pids
from tests.train import tiny
from tests.train.jobs import HERE, Jobs
from tests.train.tiny import read_events, read_metrics, read_results

STEPS = 16
SLOW = {0: ("slow", 0), 1: ("slow", 0)}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """``one`` is trained without a fault, on two devices of one process."""
    folder = tmp_path_factory.mktemp("processes")
    config = tiny.write_config(
        folder,
        tiny.write_text(folder / "text"),
        train={"steps": STEPS, "max_device_rows": 4, "ema_decay": 0.9},
        checkpoint={"every_steps": 5, "keep_last": 4},
        reporting={"tensorboard": False},
    )
    started = Jobs(folder, config)
    started.trained("one", "checkpoint.every_steps=0", devices=2)
    yield started
    started.end()


def as_if_saved_elsewhere(path: Path) -> None:
    """Let a local file be of a save of other arrays than it was."""
    with safe_open(path, "np") as file:
        keys = file.keys()
        header = file.metadata()
        arrays = {key: file.get_tensor(key) for key in keys}
    metadata = json.loads(header["metadata"])
    del metadata["sha256"], metadata["versions"]  # as an older version would
    metadata["fingerprints"] = {
        name: int(x) + 1 for name, x in metadata["fingerprints"].items()
    }
    save_file(arrays, path, header | {"metadata": json.dumps(metadata)})


@pytest.mark.more
def test_hosts_go_on_after_a_kill_a_preemption_and_the_loss_of_a_disk(jobs, tmp_path):
    settings = [
        "checkpoint.every_steps=6",
        "checkpoint.local_every_steps=4",
        f"checkpoint.local_folder={tmp_path}/fast",
        "faults.peer_seconds=10",
    ]
    run = jobs.folder / "pair"
    home = run / "checkpoints"
    digest = hashlib.sha256(str(home).encode()).hexdigest()
    place = f"pair-{digest[:8]}"
    disks = [tmp_path / "fast" / place / f"process-{number}" for number in range(2)]

    def signal_after_step(victim, number, step):
        """Send a process a signal after a step is on all disks; how both ended."""
        processes = jobs.train("pair", *settings, processes=2, faults=SLOW)
        for disk, process in zip(disks, processes, strict=True):
            process.until((disk / f"{step}.safetensors").exists)
        processes[victim].send(number)
        return [process.ended() for process in processes]

    def steps_in(folder):
        """Of complete checkpoints: folders, or files on a host's own disk."""
        names = (path.name.removesuffix(".safetensors") for path in folder.iterdir())
        return {int(name) for name in names if name.isdigit()}

    def beginning(out):
        return [line for line in out if "skipped" in line or "resuming" in line]

    (code, _, err), _ = signal_after_step(1, signal.SIGKILL, 4)
    words = (
        f"error: process 1 ({HERE}) is gone; the state is that of the last checkpoint"
    )
    assert code == 76
    assert any(words in line for line in err)  # JAX may write beside it

    newest = max(steps_in(disks[0]) & steps_in(disks[1]))
    ended = signal_after_step(1, signal.SIGTERM, 8)
    (_, out, _), _ = ended
    assert beginning(out) == [f"resuming from step {newest} in {disks[0]}"]
    words = f"preempted at step {jobs.step('pair')} of {STEPS}, which is saved"
    line = f"error: {run}: {words}; run the same command to resume"
    assert [(code, err[-1]) for code, _, err in ended] == [(75, line)] * 2

    # One host is back from elsewhere: it has lost a file, and keeps one of the run's
    # other path.
    shutil.rmtree(home / str(max(steps_in(home))))
    folder = max(steps_in(home))
    lost = steps_in(disks[0])
    newest = max(lost & steps_in(disks[1]))
    for path in disks[1].glob("*.safetensors"):
        if path.stem == str(newest):
            as_if_saved_elsewhere(path)
        else:
            path.unlink()
    out = jobs.trained("pair", *settings, processes=2)
    reasons = dict.fromkeys(lost, "process 1 has none")
    reasons[newest] = "its files are not of one save"
    # The newest first, down to the step that the run's folder has.
    skipped = [step for step in sorted(lost, reverse=True) if step >= folder]
    assert beginning(out) == [
        *(f"local checkpoint {step} is skipped: {reasons[step]}" for step in skipped),
        f"resuming from step {folder} in {home}",
    ]
    assert newest > folder
    assert read_results(run) == read_results(jobs.folder / "one")
    assert json.loads((run / "environment.json").read_text())["hosts"] == [HERE] * 2


@pytest.mark.slow
def test_two_processes_end_together_when_one_hangs(jobs):
    """Both say where they are, also the one that finds it later."""
    run = jobs.folder / "hung"
    hasty = ["faults.hang_seconds=16", "faults.hang_factor=2"]
    faults = {0: ("hang", 12), 1: ("slow", 0)}
    ended = [
        process.ended()
        for process in jobs.train("hung", *hasty, processes=2, faults=faults)
    ]
    for number, (code, _, err) in enumerate(ended):
        [line] = [line for line in err if f"process {number} hangs" in line]
        assert code == 76
        [path] = (run / "hangs").glob(f"process-{number}-step-*.txt")
        step = path.stem.rpartition("-")[2]
        assert line.startswith(f"error: {run}: process {number} hangs: step {step} (")
        assert line.endswith(
            f" s; what its threads were doing is in {path}; run the same command to "
            "resume from the last checkpoint"
        )
        # Process 0 hangs itself; process 1 waits for it in a step.
        frame = "a_place_to_hang" if number == 0 else "_finish_step"
        assert frame in path.read_text()
    assert read_run(run).history.event_counts["hang"] == 1


@pytest.mark.slow
def test_hosts_whose_settings_differ_are_told_which_settings(jobs):
    process_settings = {1: ["data.batch_size=4", "train.eval_every=9"]}
    line = (
        f"error: hosts disagree on data.batch_size: 8 on process 0 ({HERE}); 4 on "
        f"process 1 ({HERE}); and on train.eval_every; start all hosts with the same "
        "software, config and kind of machine"
    )
    processes = jobs.train("differ", processes=2, process_settings=process_settings)
    ended = [process.ended() for process in processes]
    assert [(code, err) for code, _, err in ended] == [(2, [line])] * 2


@pytest.mark.slow
def test_a_killed_loader_worker_ends_all_hosts_with_one_line_each(jobs):
    processes = jobs.train(
        "worker", "data.workers=1", "train.steps=150", processes=2, faults=SLOW
    )
    processes[1].until(lambda: jobs.step("worker") > 1)
    workers = [worker_pids(process.id) for process in processes]
    assert [len(pids) for pids in workers] == [1, 1]
    os.kill(workers[1].pop(), signal.SIGKILL)
    line = (
        "data.workers: a loader worker was killed by signal 9 (Killed), probably out "
        "of memory; run the same command to go on from the last checkpoint, with fewer "
        "data.workers or more memory if it happens again"
    )
    messages = [f"error: process 1 ({HERE}): {line}", f"error: {line}"]
    for process, message in zip(processes, messages, strict=True):
        code, _, err = process.ended()
        # JAX's own words may come behind it.
        assert (code, err.count(message)) == (76, 1), err
        assert not any("Traceback" in err_line for err_line in err)
    wait_until(lambda: not any(map(alive, workers[0] | workers[1])))


@pytest.mark.slow
def test_a_run_that_moves_from_machine_to_machine_is_the_run_that_stayed(jobs):
    home = jobs.folder / "moved"
    machines = [
        # processes, devices of each, mesh, steps by then, parts of the batch of 8
        (2, 2, "{data: 2, tensor: 2}", 5, 1),
        (1, 1, "{fsdp: 1}", 12, 2),
        (2, 1, "{fsdp: 2}", STEPS, 1),
    ]
    before = 0
    for processes, devices, mesh, until, parts in machines:
        out = jobs.trained(
            "moved",
            f"mesh={mesh}",
            f"train.steps={until}",
            processes=processes,
            devices=devices,
        )
        resumed = f"resuming from step {before} in {home / 'checkpoints'}"
        assert (resumed in out) == (before > 0)
        plan = json.loads((home / "plan.json").read_text())
        assert plan["micro_batches"] == parts
        before = until

    def read_column(name, column):
        records = read_metrics(jobs.folder / name)
        return [record[column] for record in records if "loss" in record]

    assert read_column("one", "step") == list(range(1, STEPS + 1))
    assert read_column("moved", "step") == list(range(1, STEPS + 1))
    assert read_column("moved", "tokens") == read_column("one", "tokens")
    want = read_column("one", "loss")
    assert read_column("moved", "loss") == pytest.approx(want, rel=1e-5)
    assert want[-1] < want[0] - 0.5
    starts = read_events(home, "start", "resume")
    assert [(e["processes"], e["devices"]) for e in starts] == [(2, 4), (1, 1), (2, 2)]


def test_a_machine_that_the_batch_does_not_divide_over(tmp_path):
    run = RunConfig.model_validate(
        tiny.settings(tmp_path, "", train={"max_device_rows": 2})
    )
    with pytest.raises(MaxlmError) as error:
        set_up_run(run, jax.devices()[:3])
    assert str(error.value) == (
        "train.max_device_rows: a batch of 8 sequences does not divide over 3 devices "
        "into parts of 2 or less; use a mesh whose batch axes and stages divide the "
        "batch"
    )
