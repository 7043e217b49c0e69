"""What the scripts do when processes end: run for real, with stand-ins for `srun` and
`maxlm`."""

import ast
import os
import re
import signal
import subprocess
import time

import pytest
import yaml

from maxlm.config.load import load_config
from maxlm.launch.make_job import make_job
from maxlm.launch.options import JobOptions
from maxlm.launch.render import render_job
from maxlm.run.config import RunConfig

# Each start takes the next exit code of $CODES; a start with SLEEP waits for a signal.
STAND_IN = """#!/bin/bash
trap 'sleep 0.3; echo "saved" >> "$LOG"; exit 75' TERM USR1
echo "start $*" >> "$LOG"
read -ra codes <<< "$CODES"
code=${codes[$(grep -c ^start "$LOG") - 1]}
if [[ $code == sleep ]]; then for ((i = 0; i < 1200; i++)); do sleep 0.05; done; fi
exit "$code"
"""


def environment(tmp_path, **more):
    log = tmp_path / "log"
    log.touch()
    path = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    places = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    return {"PATH": path, "LOG": str(log), **places, **more}


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *((code, None, True) for code in (76, 137)),
        *((code, None, False) for code in (0, 2, 127, 130)),
        *((75, 2, True), (75, 3, False)),
    ],
)
def test_slurm_requeues(code, restarts, requeued, program, rendered, tmp_path):
    program("srun", f'#!/bin/bash\necho "srun $*" >> "$LOG"\nexit {code}\n')
    program("scontrol", '#!/bin/bash\necho "scontrol $*" >> "$LOG"\n')
    script = rendered("slurm", "h100x64", options=JobOptions(retries=3))
    env = environment(tmp_path, SLURM_JOB_ID="17")
    if restarts is not None:
        env["SLURM_RESTART_COUNT"] = str(restarts)
    assert subprocess.run(["bash", "-c", script], env=env).returncode == code
    first, *rest = (tmp_path / "log").read_text().splitlines()
    text = "data.sources=[{store: /data/tokens}] tokenizer.path=/data/tokenizer"
    assert f"maxlm train llama2_7b {text} folder=/data/runs" in first
    assert rest == (["scontrol requeue 17"] if requeued else [])


def test_slurm_environment(program, rendered, tmp_path):
    """Values reach the processes as they are, a secret only from where the job was
    submitted."""
    program("srun", '#!/bin/bash\nenv > "$LOG"\n')
    value = "two words; $(touch hacked) 'q'"
    options = JobOptions(nodes=2, env=(f"NOTE={value}",), secret=("HF_TOKEN",))
    script = rendered("slurm", "cpux8", options=options)
    assert "#SBATCH --nodes=2" in script
    env = environment(tmp_path)
    lacking = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True
    )
    assert lacking.returncode
    assert "HF_TOKEN: is not in the environment" in lacking.stderr
    env["HF_TOKEN"] = "x"
    assert subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path).returncode == 0
    seen = (tmp_path / "log").read_text().splitlines()
    assert f"NOTE={value}" in seen
    assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"} <= set(seen)
    assert not (tmp_path / "hacked").exists()


def test_slurm_in_a_container(program, rendered, tmp_path):
    program("srun", '#!/bin/bash\nprintf "%s\\n" "$@" > "$LOG"\n')
    mounts = ("/data:/data", "/fast disk:/scratch")
    options = JobOptions(image="docker://a", mount=mounts)
    script = rendered("slurm", "h100x64", options=options)
    done = subprocess.run(["bash", "-c", script], env=environment(tmp_path))
    assert done.returncode == 0
    logged = (tmp_path / "log").read_text().splitlines()
    # pyxis takes the last of several.
    assert [word for word in logged if "mounts" in word] == [
        "--container-mounts=/data:/data,/fast disk:/scratch"
    ]


def until_started(log, count):
    deadline = time.monotonic() + 300
    while log.read_text().count("start") < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tpu_worker(rendered, program, codes, retries=100):
    # The script's waits between two starts are shorter.
    quick_sleep = '[[ $1 == 10 ]] && exec /bin/sleep 0.3\nexec /bin/sleep "$1"\n'
    program("sleep", f"#!/bin/bash\n{quick_sleep}")
    stand_in = str(program("maxlm", STAND_IN))
    options = JobOptions(maxlm=stand_in, retries=retries)
    script = rendered("tpu-vm", "v5p-64", options=options)
    return ["bash", "-c", script], {"CODES": codes}


@pytest.mark.parametrize(
    ("codes", "retries", "starts", "last"),
    [
        ("75 76 137 0", 100, 4, 0),
        ("75 2 0", 100, 2, 2),
        ("1 0", 100, 1, 1),
        ("76 76 76 0", 1, 2, 76),
    ],
)
def test_tpu_worker_restarts(codes, retries, starts, last, program, rendered, tmp_path):
    command, codes = tpu_worker(rendered, program, codes, retries=retries)
    done = subprocess.run(command, env=environment(tmp_path, **codes))
    assert done.returncode == last
    assert (tmp_path / "log").read_text().count("start") == starts


@pytest.mark.heavy
def test_tpu_worker_told_to_stop_waits_until_the_state_is_saved(
    program, rendered, tmp_path
):
    """Also told again, and before it knows its process."""
    (shell, option, script), codes = tpu_worker(rendered, program, "76 sleep 0")
    assert script.count("  pid=$!\n") == 1
    slow = script.replace("  pid=$!\n", "  /bin/sleep 0.5\n  pid=$!\n")
    log = tmp_path / "log"
    process = subprocess.Popen(
        [shell, option, slow], env=environment(tmp_path, **codes)
    )
    until_started(log, 2)
    for _ in range(4):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(timeout=300) == 75
    assert re.fullmatch(r"start .*\nstart .*\nsaved\n", log.read_text())


def test_a_worker_runs_one_at_a_time(program, rendered, tmp_path):
    """Until the first one's training has ended too, although its script was killed."""
    command, codes = tpu_worker(rendered, program, "sleep 0")
    log = tmp_path / "log"
    env = environment(tmp_path, **codes)
    first = subprocess.Popen(command, env=env, start_new_session=True)
    until_started(log, 1)
    first.kill()
    first.wait()
    second = subprocess.run(command, env=env, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr == "maxlm-llama2-7b.sh runs here already\n"
    assert log.read_text().count("start") == 1
    os.killpg(first.pid, signal.SIGKILL)
    deadline = time.monotonic() + 300
    third = subprocess.run(command, env=env, capture_output=True)
    while third.returncode == 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        third = subprocess.run(command, env=env, capture_output=True)
    assert third.returncode == 0


@pytest.mark.parametrize(
    ("on", "nodes", "header"),
    [
        *((on, None, {"--exclusive", "--mem=0"}) for on in ("h100x8", "h100:2x4")),
        ("cpux8", 2, {"--exclusive", "--mem=0"}),
        ("h100x4", None, {"--cpus-per-gpu=8", "--mem-per-gpu=64G"}),
    ],
)
def test_slurm_gives_whole_nodes_or_a_share(on, nodes, header, rendered):
    options = JobOptions(nodes=nodes, grace=10_000)
    script = rendered("slurm", on, options=options, force=True)
    words = set(re.findall("^#SBATCH (.*)", script, re.M))
    shares = {"--exclusive", "--mem=0", "--cpus-per-gpu=8", "--mem-per-gpu=64G"}
    assert words & shares == header


@pytest.mark.parametrize("scheduler", ["jobset", "skypilot", "ray", "tpu-vm"])
def test_a_config_of_this_machine_goes_along(scheduler, tmp_path, program):
    """Hosts that do not see this machine's files get the resolved config's text; where
    it cannot be written the job ends: a file of an earlier one would be trained
    instead."""
    source = tmp_path / "own.yaml"
    source.write_text(
        "include: llama2_7b\nname: own\nfolder: /data/runs\n"
        "data: {sources: [{store: gs://corpus/tokens}]}\ntokenizer: {path: "
        "/data/tokenizer}\n"
    )
    run = load_config(RunConfig, str(source), ["seed=7"]).value
    mount = ("gs://bucket:/data",) if scheduler in ("jobset", "skypilot") else ()
    options = JobOptions(image="i" if scheduler == "jobset" else None, mount=mount)
    on = "v5p-64" if scheduler == "tpu-vm" else "h100x64"
    job, _ = make_job(
        run, str(source), ["seed=7"], scheduler=scheduler, on=on, options=options
    )
    text = render_job(job)
    script = text
    if scheduler == "jobset":
        (replicated,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
        pod = replicated["template"]["spec"]["template"]["spec"]
        script = pod["containers"][0]["args"][0]
    elif scheduler == "skypilot":
        script = yaml.safe_load(text)["run"]
    elif scheduler == "ray":
        line = next(line for line in text.splitlines() if "cat >" in line)
        script = ast.literal_eval(line.strip().rstrip(","))
    written = re.search(r"cat > (/\S+) <<'(.*)' \|\| exit 2\n((?:.*\n)*?)\2\n", script)
    assert written
    sent = tmp_path / "sent.yaml"
    sent.write_text(written[3])
    assert load_config(RunConfig, sent).value == run
    assert f"maxlm train {written[1]}\n" in f"{script}\n"

    program("maxlm", '#!/bin/sh\necho "start" >> "$LOG"\n')
    unwritable = job.script.replace(written[1], str(tmp_path / "bin"))
    env = environment(tmp_path)
    done = subprocess.run(["bash", "-c", unwritable], env=env, capture_output=True)
    assert done.returncode == 2
    assert (tmp_path / "log").read_text() == ""
