"""A JobSet says what it is to say to Kubernetes: its YAML, its variables, its
volumes."""

import re
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.launch.options import JobOptions
from maxlm.launch.render import _kubernetes, _yaml
from tests.launch.conftest import DEFAULT_OPTIONS
from tests.launch.test_examples import expanded

# What YAML 1.1 and 1.2 (Kubernetes' go-yaml knows some of each) take for something else
# than text.
NO_TEXT = re.compile(
    r"~|null|y|n|yes|no|on|off|true|false|<<|="
    r"|[-+]?(\.inf|\.nan)"
    r"|[-+]?(0b[01_]+|0o?[0-7_]+|0x[0-9a-f_]+|[0-9][0-9_]*(:[0-5]?[0-9])*)"
    r"|[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)(e[-+]?[0-9]+)?"
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?",
    re.IGNORECASE | re.ASCII,
)
WORDS = (
    "",
    "\n",
    " a",
    "y",
    "No",
    "a:",
    "a: b",
    "a #b",
    "-",
    "é",
    "😀",
    "\x85",
    "/",
    "a\\b",
)
NUMBERS = ("1e5", "123e4567", "0o17", "0x1F", "12:30", "1_000", ".5")


@given(
    st.sampled_from(WORDS + NUMBERS)
    | st.text()
    | st.from_regex(NO_TEXT, fullmatch=True)
)
@settings(max_examples=100)
def test_text_stays_text(text):
    line = _yaml(text)
    assert "\n" not in line
    assert yaml.safe_load(f"key: {line}\n") == {"key": text}
    assert yaml.safe_load(f"- {line}\n") == [text]
    if NO_TEXT.fullmatch(text):
        assert line[0] == '"'
    assert _yaml("gs://bucket/a:0.1") == "gs://bucket/a:0.1"


@given(st.text("$()A ="))
def test_kubernetes_gives_back_the_text(text):
    assert expanded(_kubernetes(text), {"A": "expanded", "": "expanded"}) == text


@pytest.fixture
def pod(rendered):
    """A JobSet and its pods' spec: (machine, settings of the run, options of the
    job)."""

    def make(on, more=(), options=DEFAULT_OPTIONS):
        options = replace(
            options, image="i", mount=("gs://bucket:/data",), grace=10_000
        )
        jobset = yaml.safe_load(rendered("jobset", on, more, options, force=True))
        (job,) = jobset["spec"]["replicatedJobs"]
        return jobset, job["template"]["spec"]["template"]["spec"]

    return make


@pytest.mark.parametrize("machine", [("v5p-64", []), ("2xv5p-64", ["mesh.data=2"])])
def test_a_dollar_reaches_the_program(pod, machine):
    text = "a $(NOTE) $$ $((1)) $A"
    on, more = machine
    prompts = f'samples.prompts=["{text}"]'
    options = JobOptions(env=("FIRST=1", f"NOTE={text}"))
    _, spec = pod(on, [prompts, *more], options)
    (container,) = spec["containers"]
    variables = {
        variable["name"]: variable.get("value", "") for variable in container["env"]
    }
    assert expanded(variables["NOTE"], variables) == text
    words = [*container["command"], *container.get("args", ())]
    assert any(prompts in expanded(word, variables) for word in words)


@pytest.mark.parametrize(
    ("on", "expected"), [("v5p-8", False), ("v5p-64", True), ("h100x64", False)]
)
def test_a_slice_of_several_hosts_has_a_node_pool_to_itself(pod, on, expected):
    assert ("annotations" in pod(on)[0]["metadata"]) == expected


def test_gpus_have_a_kind(pod):
    _, spec = pod("h200x64")
    selector = {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"}
    assert spec["nodeSelector"] == selector
    _, spec = pod("h200x64", options=JobOptions(node_selector=("a=b",)))
    assert spec["nodeSelector"] == {"a": "b"}


def test_a_bucket_in_the_hosts_network(pod):
    attributes = {}
    for on, more in (("v5p-64", []), ("2xv5p-64", ["mesh.data=2"])):
        spec = pod(on, more)[1]
        attributes[on] = spec["volumes"][0]["csi"]["volumeAttributes"]
        assert spec["securityContext"]["fsGroup"] == 1000
    assert "hostNetworkPodKSA" not in attributes["v5p-64"]
    assert attributes["2xv5p-64"]["hostNetworkPodKSA"] == "true"
