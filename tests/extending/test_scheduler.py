"""A scheduler as an external package writes it: PBS, whose batch scripts start one
process on each node with ``pbsdsh``."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from maxlm.cli.main import main
from maxlm.config import MaxlmError, registry
from maxlm.launch.job import Job
from maxlm.launch.options import JobOptions
from maxlm.launch.schedulers import SCHEDULERS, JobScheduler

TEMPLATE = """#!/bin/bash
# {{ title }}
#PBS -N {{ name }}
#PBS -l select={{ hosts.count }}:ngpus={{ hosts.devices }}
{% if queue %}
#PBS -q {{ queue }}
{% endif %}
{% for variable, value in env.items() %}
export {{ variable }}={{ value | shell }}
{% endfor %}
exec pbsdsh -- {{ command | shell }}
"""


class PbsScheduler(JobScheduler):
    name = "pbs"
    platforms = ("gpu",)
    options = frozenset({"name", "queue", "account"})
    shares_files = True

    def __init__(self, template: Path):
        # The file lies in the package, beside its code.
        self.template = template

    def check_options(self, options: JobOptions) -> None:
        if options.account and not options.queue:
            raise MaxlmError("--account has no queue", fix="add --queue")

    def list_submit_commands(self, job: Job, path: Path) -> list[list[str]]:
        return [["qsub", "-V", str(path)]]


@pytest.fixture
def pbs(tmp_path, monkeypatch):
    template = tmp_path / "job.pbs.j2"
    template.write_text(TEMPLATE)
    scheduler = PbsScheduler(template)
    # Restored, so that the schedulers of other tests are the built-in ones.
    monkeypatch.setattr(SCHEDULERS, "_loaded", dict(SCHEDULERS._loaded))
    return SCHEDULERS.register("pbs", scheduler)


@pytest.fixture
def command(tmp_path):
    """The words of a command line that asks for a job on 8 hosts."""
    words = ["launch", "pbs", "llama2_7b", "data.sources=[{store: /data/tokens}]"]
    words += ["tokenizer.path=/data/tokenizer", f"folder={tmp_path / 'runs'}"]
    return [*words, "--on", "h100x64"]


@pytest.mark.usefixtures("pbs")
def test_its_job_is_printed_and_submitted(command, tmp_path, monkeypatch, capfd):
    client = tmp_path / "bin" / "qsub"
    client.parent.mkdir()
    printing = "import json, sys; print(json.dumps(sys.argv[1:]))"
    client.write_text(f"#!{sys.executable}\n{printing}\n")
    client.chmod(0o755)
    monkeypatch.setenv("PATH", str(client.parent))
    monkeypatch.chdir(tmp_path)
    options = ["--queue", "gpu", "--env", "NOTE=two words"]
    assert main([*command, *options, "--submit"]) == 0
    out = capfd.readouterr().out
    path = tmp_path / "runs" / "llama2_7b" / "launch" / "job.pbs"
    script = path.read_text()
    assert out.startswith(script)
    assert json.loads(out.removeprefix(script)) == ["-V", str(path)]

    # A shell that runs it starts the training that the command line describes.
    launcher = tmp_path / "bin" / "pbsdsh"
    launcher.write_text('#!/bin/sh\necho "$NOTE"\nprintf "%s\\n" "$@"\n')
    launcher.chmod(0o755)
    started = subprocess.run(
        ["/bin/bash", path], capture_output=True, text=True, check=True
    )
    assert started.stdout.splitlines() == [
        *("two words", "--", "maxlm", "train", "llama2_7b"),
        "data.sources=[{store: /data/tokens}]",
        "tokenizer.path=/data/tokenizer",
        f"folder={tmp_path / 'runs'}",
    ]
    header = [line for line in script.splitlines() if line.startswith("#PBS")]
    assert header == [*("#PBS -N llama2-7b", "#PBS -l select=8:ngpus=8", "#PBS -q gpu")]


@pytest.mark.usefixtures("pbs")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("--image i", "pbs has no use for --image; install maxlm on its hosts"),
        ("--zone z", "pbs has no use for --zone; leave it out (skypilot, tpu-vm has"),
        ("--account a", "--account has no queue; add --queue"),
        ("--on v5p-64", "pbs is not for TPUs, and v5p-64 is one; use jobset or sky"),
    ],
)
def test_what_it_does_not_take_is_refused(changes, message, command, capfd):
    assert main([*command, *shlex.split(changes)]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_an_installed_package_declares_it(command, pbs, monkeypatch, capfd):
    """By an entry point, which is listed without being imported."""
    entry = EntryPoint("pbs", "a_package:PBS", SCHEDULERS.group)
    assert entry.group == "maxlm.schedulers"
    monkeypatch.setattr(SCHEDULERS, "_loaded", {})

    def list_entry_points(group: str, name: str = "pbs") -> list[EntryPoint]:
        return [entry] if (group, name) == (entry.group, entry.name) else []

    monkeypatch.setattr(registry, "entry_points", list_entry_points)
    assert SCHEDULERS.kinds()[-1] == "pbs"
    assert main(["launch", "pbss", *command[2:]]) == 2
    assert capfd.readouterr().err == (
        "error: there is no scheduler 'pbss'; did you mean pbs?\n"
    )
    monkeypatch.setattr(EntryPoint, "load", lambda entry: pbs)
    assert SCHEDULERS.get("pbs") is pbs
