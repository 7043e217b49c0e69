"""A run that starts from another's parameters: refused at once if they do not fit, and
on its own once it has begun; and one that is traced."""

import shutil
from pathlib import Path

import pytest

from maxlm.config import MaxlmError
from maxlm.run.load import load_run
from maxlm.train import program as program
from tests.train import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]


def train(folder, text, *overrides, train, resume=None) -> list[str]:
    """Trains with these settings of training; returns the lines that the run said."""
    config = tiny.write_config(
        folder,
        text,
        train=train,
        checkpoint={"every_steps": 1, "keep_last": 1},
        reporting={"tensorboard": False},
    )
    _, lines = tiny.train(config, "data.heldout_fraction=0", *overrides, resume=resume)
    return lines


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def other(text, tmp_path, compiled_once):
    """A run after one step. It may be deleted; ``later/tiny`` beside the text is how it
    goes on."""
    one, later = (Path(text).with_name(name) for name in ("one", "later"))
    if not later.exists():
        train(one, text, train={"steps": 1})
        shutil.copytree(one, later)
        train(later, text, train={"steps": 2})
    return shutil.copytree(one / "tiny", tmp_path / "first")


def test_another_model_is_refused_before_anything_is_written(tmp_path, text, other):
    start = {"steps": 1, "start_from": str(other)}
    with pytest.raises(
        MaxlmError, match=r"checkpoint of another model: params\.layers\.mlp"
    ):
        train(tmp_path / "second", text, "model.mlp.d_ff=72", train=start)
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["tiny.yaml"]


@pytest.mark.more
def test_what_it_started_from_may_go_once_it_has_begun(tmp_path, text, other):
    start = {"steps": 1, "start_from": str(other)}
    train(tmp_path / "second", text, train=start)
    shutil.rmtree(other)
    train(
        tmp_path / "second", text, "checkpoint.keep_last=2", train=start | {"steps": 2}
    )
    assert load_run(tmp_path / "second/tiny").step == 2
    (tmp_path / "second/tiny/checkpoints/2/metadata/metadata").write_text("")
    assert (
        load_run(tmp_path / "second/tiny", step=1).step == 1
    )  # whatever became of the newest


@pytest.mark.parametrize(
    "origin", ["start_from", pytest.param("resume", marks=pytest.mark.more)]
)
def test_a_run_that_goes_on_meanwhile_is_read_where_it_is_by_then(
    tmp_path, text, other, monkeypatch, origin
):
    """It deletes its old checkpoints, while this one prepares its text."""
    prepare = program.prepare_data_on_all_hosts

    def slowly(*arguments):
        shutil.rmtree(other)
        shutil.copytree(Path(text).with_name("later") / "tiny", other)
        assert not (other / "checkpoints" / "1").exists()
        return prepare(*arguments)

    monkeypatch.setattr(program, "prepare_data_on_all_hosts", slowly)
    settings = {"steps": 3}
    resume = None
    if origin == "start_from":
        settings["start_from"] = str(other)
        expected = f"starting from the parameters in {other}"
    else:
        resume = other
        expected = f"resuming from step 2 in {other / 'checkpoints'}"
    lines = train(tmp_path / "second", text, train=settings, resume=resume)
    assert lines[0] == expected


@pytest.mark.more
def test_traced_steps_that_never_come_and_that_have_been_taken(tmp_path, text):
    path = tiny.write_config(
        tmp_path, text, train={"steps": 2}, reporting={"tensorboard": False}
    )
    run = tmp_path / "tiny"
    nothing_held_out = "data.heldout_fraction=0"
    with pytest.raises(MaxlmError) as error:
        tiny.train(path, nothing_held_out, profile=(3, 5))
    assert str(error.value) == (
        "--profile: step 3 never comes: the run has 2 steps; name steps that it takes"
    )
    assert not run.exists()
    _, lines = tiny.train(path, nothing_held_out, profile=(2, 5))
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert not [line for line in lines if "trace" in line]
    # As one started again does.
    _, lines = tiny.train(path, nothing_held_out, "train.steps=3", profile=(1, 2))
    assert "no trace is taken: step 2, the last to trace, has been taken" in lines
