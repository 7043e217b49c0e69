"""The committed examples are what the README's commands print, and what schedulers' own
checks take."""

import re
import shlex
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from maxlm.cli.main import main

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "launch/examples"
README = (ROOT / "launch/README.md").read_text()
COMMANDS = {
    Path(words[-1]).name: words[1:-2]
    for line in README.splitlines()
    if line.startswith("maxlm launch")
    for words in (shlex.split(line),)
}


def test_every_example_has_a_command():
    assert sorted(COMMANDS) == sorted(path.name for path in EXAMPLES.iterdir())
    assert {words[1] for words in COMMANDS.values()} == {
        *("slurm", "jobset", "skypilot", "ray", "tpu-vm")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_is_what_its_command_prints(name, capfd):
    assert main(COMMANDS[name]) == 0
    assert capfd.readouterr().out == (EXAMPLES / name).read_text()


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name.endswith((".sh", ".sbatch"))]
)
def test_shell_scripts(name):
    checker = Path(sys.executable).with_name("shellcheck")
    for command in (["bash", "-n"], [checker, "--shell=bash"]):
        result = subprocess.run(
            [*command, EXAMPLES / name], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr


def round_trip(jobset):
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    parsed = JobsetV1alpha2JobSet.from_dict(deepcopy(jobset))
    assert parsed is not None
    return parsed.to_dict()


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if name.startswith("jobset")]
)
def test_a_jobset_has_known_fields_alone(name):
    """The API's generated models drop a field they do not know."""
    jobset = yaml.safe_load((EXAMPLES / name).read_text())
    assert round_trip(jobset) == jobset
    wrong = deepcopy(jobset)
    wrong["spec"]["failurePolicy"]["maxRestart"] = 1
    assert round_trip(wrong) == jobset


def expanded(text, variables):
    """What Kubernetes makes of a container's command, arguments and variables' values
    (third_party/forked/golang/expansion, and the API's words on `command`): ``$$`` is
    ``$``, ``$(NAME)`` a variable or itself, and any other ``$`` one."""
    result = ""
    at = 0
    while at < len(text):
        end = text.find(")", at)
        if text[at : at + 2] == "$$":
            result += "$"
            at += 2
        elif text[at : at + 2] == "$(" and end > 0:
            name = text[at + 2 : end]
            result += variables.get(name, text[at : end + 1])
            at = end + 1
        else:
            result += text[at]
            at += 1
    return result


@pytest.mark.parametrize(
    ("name", "slices", "hosts", "chips", "selector"),
    [
        ("jobset-v5p-256.yaml", 1, 32, 4, ("tpu-v5p-slice", "4x4x8")),
        ("jobset-2xv5e-256.yaml", 2, 64, 4, ("tpu-v5-lite-podslice", "16x16")),
        ("jobset-h100x64.yaml", 1, 8, 8, None),
    ],
)
def test_a_jobset_gives_each_process_its_number(name, slices, hosts, chips, selector):
    """Every pod's environment, as Kubernetes would fill it in, run by a shell: numbers
    0 to n-1."""
    spec = yaml.safe_load((EXAMPLES / name).read_text())["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    assert (replicated["replicas"], job["completions"], job["parallelism"]) == (
        slices,
        hosts,
        hosts,
    )
    assert list(container["resources"]["limits"].values()) == [chips]
    (codes,) = [
        rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    ]
    assert codes == [1, 2, 75, 126, 127]
    if selector:
        keys = (
            "cloud.google.com/gke-tpu-accelerator",
            "cloud.google.com/gke-tpu-topology",
        )
        assert tuple(pod["nodeSelector"][key] for key in keys) == selector
    rules = {rule["name"]: rule for rule in spec["failurePolicy"]["rules"]}
    # As Kubernetes' Job controller words it (pkg/controller/job/pod_failure_policy.go).
    exit_code = "Container train for pod a/b failed with exit code {} matching FailJob rule at index 1"
    evicted = "Pod a/b has condition DisruptionTarget matching FailJob rule at index 0"
    for message, rule in [
        *((exit_code.format(code), "Failed") for code in (1, 2, 126, 127)),
        *((exit_code.format(code), None) for code in (12, 76, 125, 128, 137)),
        *((message, "Preempted") for message in (exit_code.format(75), evicted)),
    ]:
        matching = []
        for name, policy in rules.items():
            patterns = policy["onJobFailureMessagePatterns"]
            if any(re.search(pattern, message) for pattern in patterns):
                matching.append(name)
        assert matching == ([rule] if rule else []), message
    script = 'echo "$MAXLM_PROCESS_ID $MAXLM_NUM_PROCESSES $MAXLM_COORDINATOR"'
    if container["command"] == ["/bin/sh", "-c"]:
        script = (
            expanded(container["args"][0], {}).split("exec maxlm train")[0] + script
        )
    seen = []
    for slice_ in range(slices):
        for host in (0, 1, hosts - 1):
            fields = {
                "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(
                    host
                ),
                "metadata.labels['jobset.sigs.k8s.io/job-index']": str(slice_),
            }
            env = {
                entry["name"]: entry.get("value")
                or fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
                for entry in container["env"]
                if "secretKeyRef" not in entry.get("valueFrom", {})
            }
            out = subprocess.run(
                ["sh", "-c", script], env=env, capture_output=True, text=True
            )
            number, total, coordinator = out.stdout.split()
            assert int(total) == slices * hosts
            assert coordinator.endswith(":8476")
            assert re.match(r"(llama3-\d+b)-(slice|hosts)-0-0\.\1:", coordinator)
            seen.append(int(number))
    assert seen == [s * hosts + h for s in range(slices) for h in (0, 1, hosts - 1)]


def test_skypilot_numbers_its_nodes():
    """What SkyPilot sets on each node becomes what `maxlm train` reads."""
    run = yaml.safe_load((EXAMPLES / "skypilot-h100x16.yaml").read_text())["run"]
    script = run.split("exec ")[0] + "env | grep ^MAXLM | sort"
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9", "SKYPILOT_NUM_NODES": "2"}
    env = {**nodes, "SKYPILOT_NODE_RANK": "1", "PATH": "/usr/bin:/bin"}
    out = subprocess.run(
        ["bash", "-c", script], env=env, capture_output=True, text=True
    ).stdout
    assert out.split() == [
        "MAXLM_COORDINATOR=10.0.0.7:8476",
        "MAXLM_NUM_PROCESSES=2",
        "MAXLM_PROCESS_ID=1",
    ]
