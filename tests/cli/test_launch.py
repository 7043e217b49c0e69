"""maxlm launch: what is refused in which words, what is written, what clients are
given."""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from maxlm.cli.launch import command

ROOT = Path(__file__).parents[2]
TEXT = ["data.sources=[{store: /data/tokens}]", "tokenizer.path=/data/tokenizer"]
GPU = ["llama2_7b", *TEXT, "folder=/data/runs", "--on", "h100x64"]
TPU = ["llama2_7b", *TEXT, "folder=/data/runs", "--on", "v5p-64"]
ROWS = ["llama3_8b_sft_lora", "folder=/data/runs", "--on", "h100x64"]
PROMPTS = ["rl/qwen3_8b_grpo", "folder=/data/runs", "--on", "h100x64"]
IN_CLUSTER = ["--image", "i", "--mount", "gs://bucket:/data"]


# What `maxlm launch` is given, and below it what the one line on stderr contains.
REFUSED = r"""
slrum $GPU
    there is no scheduler 'slrum'; did you mean slurm?
slurm $TPU
    slurm is not for TPUs, and v5p-64 is one; use jobset or skypilot or
tpu-vm $TPU --on 2xv5p-64
    tpu-vm starts one slice, and 2xv5p-64 is 2; use jobset
slurm llama2_7b folder=/data/runs --on h100x64
    data.sources: no text to train on; name documents or a store there
slurm $ROWS
    task.files: no rows to train on; name a .jsonl or .parquet file there
slurm $PROMPTS
    task.environment.files: no rows to train on; name a .jsonl or .parquet file there
ray $PROMPTS 'task.environment.files=[a.jsonl]' train.start_from=/data/qwen
    task.environment.files.0=a.jsonl is another one on each host; name one that all see:
    task.environment.files.0=/data/a.jsonl
ray $PROMPTS 'task.environment.files=[/a]' 'task.rewards=[{kind: reward_model, run: runs/r}]' train.start_from=/q
    task.rewards.0.run=runs/r is another one on each host; name one that all see:
    task.rewards.0.run=/data/runs/r
jobset $ROWS $IN_CLUSTER 'task.files=[/data/a.jsonl]' train.start_from=/models/llama
    train.start_from=/models/llama is not in the container; mount what holds it: --mount
    gs://bucket:/models
ray $ROWS task.kind=dpo task.reference=runs/a 'task.files=[/a]' train.start_from=/data/llama
    task.reference=runs/a is another one on each host; name one that all see:
    task.reference=/data/runs/a
ray $ROWS 'task.files=[a.jsonl]' train.start_from=/data/llama
    task.files.0=a.jsonl is another one on each host; name one that all see:
    task.files.0=/data/a.jsonl
slurm $GPU --nodes 4
    --nodes 4: h100x64 is 8 hosts of 8; leave --nodes out, or name the shape of GPUs, as in
    h100:16x4
jobset $GPU
    jobset runs a container, and none is named; add --image; launch/images/ has files to build
    one from
slurm $GPU --image i
    folder=/data/runs would be lost with its hosts; mount what is to keep it: --mount
    /data:/data
slurm $GPU --spot
    slurm has no use for --spot; ask for such machines where
slurm $GPU --partition 'a\n#SBATCH --uid=0'
    --queue 'a #SBATCH --uid=0' is not one plain word
slurm $GPU --time 5m
    --time 00:05:00 is over before a step is saved: 300 s to start,
slurm $GPU --env WANDB_API_KEY=abc
    --env WANDB_API_KEY=... looks like a secret, and would be written into a file; use
    --secret WANDB_API_KEY, which names where it is kept
jobset $GPU $IN_CLUSTER --secret HF_TOKEN
    --secret HF_TOKEN does not name a Kubernetes secret and its key; write --secret
    HF_TOKEN=huggingface/token
jobset $GPU --image i --mount gcs://bucket:/data
    --mount: 'gcs://bucket' is no bucket's URL; write gs:// or s3://
ray $GPU folder=gs://b/a
    folder: gs://b/a is not on a disk; only a
tpu-vm $TPU 'data.sources=[{documents: [python-stdlib, "text/*.txt"]}]'
    data.sources.0.documents.1=text/*.txt is another one on each host; name one that all see:
    data.sources.0.documents.1=/data/text/*.txt
jobset $GPU $IN_CLUSTER 'data.sources=[{store: /tokens/*.gz}]'
    data.sources.0.store=/tokens/*.gz is not in the container; mount what holds it: --mount
    gs://bucket:/tokens
slurm $GPU --grace 1
    --grace 1 is shorter than a step (7.78 s)
slurm $GPU --env 'A=b\udcff'
    --env A=... holds a byte that is no UTF-8, which a job's file cannot; write the value in UTF-8
slurm $GPU --env A=1 --secret A
    A is named by --env and by --secret; leave one out
slurm $GPU --template nowhere.j2
    nowhere.j2: cannot be read: No such file
"""
SHORT = {
    "$GPU": GPU,
    "$TPU": TPU,
    "$ROWS": ROWS,
    "$PROMPTS": PROMPTS,
    "$IN_CLUSTER": IN_CLUSTER,
}


@pytest.mark.parametrize(
    ("line", "message"), re.findall(r"^(\S.*)\n((?:    .*\n)+)", REFUSED, re.M)
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    line, message, check_refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for short, long in SHORT.items():
        line = line.replace(short, shlex.join(long))
    arguments = [
        word.replace("\\n", "\n").replace("\\udcff", "\udcff")
        for word in shlex.split(line)
    ]
    command = ["launch", *arguments, "--out", "job", "--submit"]
    one_line = " ".join(message.split())
    check_refused(tmp_path, command, f"...{one_line}...")


def test_what_does_not_fit_says_how_to_find_what_does(run, check_refused, tmp_path):
    job = ["launch", "slurm", *GPU[:-1], "h100x8"]
    fix = "find what does: maxlm plan llama2_7b --on h100x8 --search (or --force)"
    check_refused(tmp_path, job, f"llama2_7b: does not fit on h100x8: ...; {fix}")
    assert "--gpus-per-node=8" in run(*job, "--force").out


STORE_PLACEHOLDERS = [
    "data.sources=[{store: /path/to/tokens}]",
    "tokenizer.path=/path/to/tokenizer",
]
ROW_PLACEHOLDERS = [
    "task.files=[/path/to/rows.jsonl]",
    "train.start_from=/path/to/model",
]
PROMPT_PLACEHOLDERS = [
    "task.environment.files=[/path/to/rows.jsonl]",
    "train.start_from=/path/to/model",
]


@pytest.mark.parametrize(
    ("arguments", "placeholders"),
    [
        (["slurm", "llama2_7b", "--on", "h100x64"], STORE_PLACEHOLDERS),
        (
            ["jobset", "llama2_7b", *IN_CLUSTER, "--on", "h100x64"],
            [*STORE_PLACEHOLDERS, "folder=/path/to/runs"],
        ),
        (
            ["skypilot", "my.yaml", *IN_CLUSTER, "--on", "h100x64"],
            [*STORE_PLACEHOLDERS, "folder=/path/to/runs"],
        ),
        (
            ["slurm", "llama3_8b_sft_lora", "data.batch_size=64", "--on", "h100x64"],
            ROW_PLACEHOLDERS,
        ),
        (
            ["ray", "qwen3_8b_grpo", "folder=/data/runs", "--on", "h100x64"],
            PROMPT_PLACEHOLDERS,
        ),
    ],
)
def test_a_recipe_without_data_gets_a_job_with_placeholders(
    arguments, placeholders, client, run
):
    """Paths put in their place make the job that these paths themselves make."""
    Path("my.yaml").write_text("include: llama2_7b\n")
    paths = [setting.replace("/path/to/", "/data/") for setting in placeholders]
    expected = run("launch", *arguments, *paths).out
    code, out, err = run("launch", *arguments)
    assert code == 0
    mark = re.findall("; REPLACE THE PLACEHOLDERS in .*", out)
    assert len(mark) == 1
    assert {setting.split("=")[0] for setting in placeholders} == {
        re.sub(r"\.0.*", "", key) for key in mark[0].split(" in ")[1].split(", ")
    }
    assert out.replace(mark[0], "").replace("/path/to/", "/data/") == expected
    words = "the job has placeholders; set paths of your own: "
    assert err.startswith(f"warning: {words}{shlex.join(placeholders)}\n")
    code, _, err = run("launch", *arguments, *placeholders, "--submit")
    assert (code, " is a placeholder; name a path of your own" in err) == (2, True)
    assert sorted(os.listdir()) == ["bin", "my.yaml"]


def test_a_template_of_ones_own(run, check_refused, tmp_path):
    template = tmp_path / "own.j2"
    template.write_text("{{ name }} on {{ hosts.count }}: {{ command | shell }}\n")
    job = ["launch", "slurm", *GPU, "--template", str(template)]
    assert run(*job).out == (
        "llama2-7b on 8: maxlm train llama2_7b 'data.sources=[{store: /data/tokens}]' "
        "tokenizer.path=/data/tokenizer folder=/data/runs\n"
    )
    rows = [
        *ROWS,
        "data.batch_size=64",
        "task.files=[/data/a.jsonl]",
        "train.start_from=/data/llama",
    ]
    script = run("launch", "slurm", *rows, "--template", str(template)).out
    assert script.startswith(
        "llama3-8b-sft-lora on 8: maxlm tune llama3_8b_sft_lora folder="
    )
    template.write_text("{{ name }}\n{{ nmae }}\n")
    check_refused(
        tmp_path, job, "...own.j2: 'nmae' is undefined; compare with the shipped..."
    )
    template.write_text("\n{% if %}\n")
    check_refused(tmp_path, job, "...own.j2:2: ...")
    where = str(template / "job")
    template.write_text("")
    check_refused(tmp_path, [*job, "--out", where], f"{where}: cannot write: ...")


CLIENT = """#!{python}
import json, sys
print(json.dumps([{name!r}, *sys.argv[1:]]))
sys.exit({code})
"""


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Puts a stand-in for a scheduler's client on the PATH, which prints what it is
    given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()

    def make(name, code=0):
        path = tmp_path / "bin" / name
        path.write_text(CLIENT.format(python=sys.executable, name=name, code=code))
        path.chmod(0o755)

    return make


TPU_VM = "gcloud compute tpus tpu-vm"
WHERE = "--worker=all --zone=us-east5-a --project=p"
START = (
    "mv maxlm-mine.sh.new maxlm-mine.sh || exit; "
    "setsid nohup bash maxlm-mine.sh >> maxlm-mine.log 2>&1 < /dev/null &"
)


@pytest.mark.parametrize(
    ("arguments", "calls", "file_name"),
    [
        (["slurm", *GPU, "folder=runs"], ["sbatch {path}"], "job.sbatch"),
        (["jobset", *GPU, *IN_CLUSTER], ["kubectl create -f {path}"], "jobset.yaml"),
        (
            ["skypilot", *GPU, *IN_CLUSTER, "--secret", "HF_TOKEN"],
            ["sky jobs launch --yes --detach-run --secret HF_TOKEN {path}"],
            "task.yaml",
        ),
        (
            ["ray", *GPU],
            [
                "ray job submit --no-wait --working-dir runs/llama2_7b/launch -- "
                "python driver.py"
            ],
            "driver.py",
        ),
        (
            [
                "tpu-vm",
                *TPU,
                "--name",
                "mine",
                "--zone",
                "us-east5-a",
                "--project",
                "p",
            ],
            [
                f"{TPU_VM} scp {{path}} mine:maxlm-mine.sh.new {WHERE}",
                f"{TPU_VM} ssh mine {WHERE} '--command={START}'",
            ],
            "worker.sh",
        ),
    ],
)
def test_submit(arguments, calls, file_name, client, run):
    path = f"runs/llama2_7b/launch/{file_name}"
    calls = [shlex.split(call.format(path=path)) for call in calls]
    job = ["launch", *arguments, "--submit"]
    code, _, err = run(*job)
    message = (
        f"{path}: {calls[0][0]} is not on the PATH here; the job is kept in this file"
    )
    assert (code, message in err) == (2, True)
    text = Path(path).read_text()
    # What is submitted is what is kept, wherever else it is written.
    client(calls[0][0])
    code, out, err = run(*job, "--out", "elsewhere")
    assert (code, out.startswith(text)) == (0, True)
    assert [json.loads(line) for line in out.removeprefix(text).splitlines()] == calls
    assert err.endswith(f"written: elsewhere\nwritten: {path}\n")
    assert Path("elsewhere").read_text() == text
    client(calls[0][0], code=3)
    code, out, _ = run(*job)
    assert (code, len(out.removeprefix(text).splitlines())) == (1, 1)
    assert os.listdir(Path(path).parent) == [file_name]


def test_a_spot_node_has_no_such_grace(run):
    job = ["launch", "jobset", *GPU, *IN_CLUSTER]
    note = "note: GKE's Spot nodes give 15 s, not 120, unless their pool says so\n"
    cases = [([], ""), (["--spot"], note), (["--spot", "--grace", "15"], "")]
    for options, expected in cases:
        notes = re.findall("note: .*\n", run(*job, *options).err)
        assert "".join(notes) == expected


def test_known_errors_of_the_plan_are_noted(run):
    long = ["llama3_8b", *TEXT, "folder=/data/runs", "--on", "h100x64"]
    note = "note: speeds known to be wrong (compared with 116 published runs): H100 at ≥ 8,192"
    assert run("launch", "slurm", *long).err.count(note) == 1
    assert "note: " not in run("launch", "slurm", *GPU).err


def documented():
    files = ("docs/launch.md", "README.md", "launch/README.md")
    texts = [*((ROOT / file).read_text() for file in files), command.__doc__]
    commands = [re.findall(r"^ *maxlm launch .*", text, re.MULTILINE) for text in texts]
    assert all(commands)
    return [line.strip() for lines in commands for line in lines]


@pytest.mark.parametrize("line", documented())
def test_documented_commands_work(line, client, run):
    guide = (ROOT / "docs/launch.md").read_text()
    Path("my.yaml").write_text(re.findall("```yaml\n(.*?)```", guide, re.DOTALL)[0])
    client("gcloud")
    assert run(*shlex.split(line)[1:]).code == 0
