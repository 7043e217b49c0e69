"""Steps to be traced that a run does not take are not passed over in silence."""

import pytest

from maxlm.config import MaxlmError, load_config
from maxlm.programs.train import train_model
from maxlm.run import RunConfig
from tests.programs import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_steps_that_never_come_and_steps_that_have_been_taken(tmp_path):
    path = tiny.write_config(tmp_path, tiny.write_text(tmp_path / "text"), train={"steps": 2})
    config, run, said = load_config(RunConfig, path).value, tmp_path / "tiny", []
    with pytest.raises(MaxlmError) as error:
        train_model(config, profile=(3, 5), say=said.append)
    assert str(error.value) == (
        "--profile: step 3 never comes: the run has 2 steps; name steps that it takes"
    )
    assert not run.exists()
    train_model(config, profile=(2, 5), say=said.append)
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert not [line for line in said if "trace" in line]
    longer = load_config(RunConfig, path, ["train.steps=3"]).value
    train_model(longer, profile=(1, 2), say=said.append)  # as a job that is started again does
    assert "no trace is taken: step 2, the last to trace, has been taken" in said
