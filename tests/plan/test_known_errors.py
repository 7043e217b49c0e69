"""A plan says where its speeds are known to be wrong, and nothing where they are
not."""

from pathlib import Path

import pytest

from maxlm.plan.known_errors import KNOWN_TIME_ERRORS
from maxlm.plan.machine import Machine
from maxlm.plan.predict import plan_run
from tests.plan.test_predict import run

ROOT = Path(__file__).parents[2]
STAGES = ("mesh.stage=2", "train.micro_batches=2")
# What is planned, and the kinds of errors that published runs of its kind show.
PLANS = (
    ("llama2_7b", "h100x64", ("mesh.tensor=2", *STAGES), ["gpu_tensor_stage"]),
    ("llama2_7b", "h100x64", ("mesh.tensor=2",), []),
    ("llama2_7b", "h100x64", STAGES, []),
    ("llama2_7b", "v5p-128", ("mesh.tensor=2", *STAGES), []),
    ("llama3_8b", "h100x64", (), ["h100_long_sequences"]),
    ("llama3_8b", "h100x64", ("data.seq_len=8191",), []),
    ("llama3_8b", "h200x64", ("mesh.context=2",), []),
    ("llama2_7b", "h100x64", ("mesh.context=2",), ["h100_context"]),
    ("mixtral_8x7b", "v5p-256", (), ["experts"]),
    ("llama2_7b", "a100x64", (), ["a100"]),
    ("llama2_7b", "v5e-256", (), []),
)


@pytest.mark.parametrize(("config", "machine", "settings", "kinds"), PLANS)
def test_a_plan_names_the_errors_of_its_kind(config, machine, settings, kinds):
    plan = plan_run(run(config, *settings), Machine.from_name(machine)).to_json()
    assert [error["kind"] for error in plan["known_time_errors"]] == kinds
    declared = {error.kind: error.deviation for error in KNOWN_TIME_ERRORS}
    for error in plan["known_time_errors"]:
        assert error["deviation"] == declared[error["kind"]]


def test_without_a_machine_no_speed_is_wrong():
    sizes = dict.fromkeys(("stage", "data", "fsdp", "expert", "context", "tensor"), 1)
    assert (
        plan_run(run("mixtral_8x7b"), sizes=sizes).to_json()["known_time_errors"] == []
    )


def test_every_kind_is_met_by_a_plan_and_stands_on_the_page_of_the_docs():
    page = (ROOT / "docs/plan.md").read_text()
    met = {kind for *_, kinds in PLANS for kind in kinds}
    for error in KNOWN_TIME_ERRORS:
        assert error.kind in met
        assert f"| {error.plans} | {error.deviation} |" in page
