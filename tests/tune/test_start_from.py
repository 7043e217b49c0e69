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


def train(folder, text, *overrides, resume=None, **top) -> list[str]:
    top |= {
        "checkpoint": {"every_steps": 1, "keep_last": 1},
        "reporting": {"tensorboard": False},
    }
    own = ("data.heldout_fraction=0", *overrides)
    return tiny.train(tiny.write_config(folder, text, **top), *own, resume=resume)[1]


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
    "how", ["start_from", pytest.param("resume", marks=pytest.mark.more)]
)
def test_a_run_that_goes_on_meanwhile_is_read_where_it_is_by_then(
    tmp_path, text, other, monkeypatch, how
):
    """It deletes its old checkpoints, while this one prepares its text."""
    prepare = program.prepare_data_on_all_hosts

    def slowly(*arguments):
        shutil.rmtree(other)
        shutil.copytree(Path(text).with_name("later") / "tiny", other)
        assert not (other / "checkpoints" / "1").exists()
        return prepare(*arguments)

    monkeypatch.setattr(program, "prepare_data_on_all_hosts", slowly)
    steps = {"steps": 3}
    resume = None
    if how == "start_from":
        steps |= {"start_from": str(other)}
    else:
        resume = other
    said = train(tmp_path / "second", text, train=steps, resume=resume)
    assert said[0] == (
        f"starting from the parameters in {other}"
        if how == "start_from"
        else f"resuming from step 2 in {other / 'checkpoints'}"
    )


@pytest.mark.more
def test_traced_steps_that_never_come_and_that_have_been_taken(tmp_path, text):
    how = {"train": {"steps": 2}, "reporting": {"tensorboard": False}}
    path = tiny.write_config(tmp_path, text, **how)
    run = tmp_path / "tiny"
    none = "data.heldout_fraction=0"
    with pytest.raises(MaxlmError) as error:
        tiny.train(path, none, profile=(3, 5))
    assert str(error.value) == (
        "--profile: step 3 never comes: the run has 2 steps; name steps that it takes"
    )
    assert not run.exists()
    _, said = tiny.train(path, none, profile=(2, 5))
    assert list((run / "profile").rglob("*.xplane.pb"))
    assert not [line for line in said if "trace" in line]
    _, said = tiny.train(
        path, none, "train.steps=3", profile=(1, 2)
    )  # as one started again does
    assert "no trace is taken: step 2, the last to trace, has been taken" in said
