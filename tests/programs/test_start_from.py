"""A run that starts from another's parameters: refused at once if they do not fit, and on its own
once it has begun."""

import pytest

from maxlm.config import MaxlmError, load
from maxlm.programs.load import load_run
from maxlm.programs.pretrain import pretrain
from maxlm.run import RunConfig
from tests.programs import tiny


def train(folder, text, *overrides, **top) -> None:
    path = tiny.write_config(folder, text, **top)
    pretrain(load(RunConfig, path, overrides).value, say=lambda _: None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text"))


def test_another_model_is_refused_before_anything_is_written(tmp_path, text):
    train(tmp_path / "first", text, train={"steps": 1})
    start = {"steps": 1, "start_from": str(tmp_path / "first/tiny")}
    with pytest.raises(MaxlmError, match=r"checkpoint of another model: params\.layers\.mlp"):
        train(tmp_path / "second", text, "model.mlp.d_ff=72", train=start)
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["tiny.yaml"]


def test_what_it_started_from_may_go_once_it_has_begun(tmp_path, text):
    train(tmp_path / "first", text, train={"steps": 1})
    start = {"steps": 1, "start_from": str(tmp_path / "first/tiny")}
    train(tmp_path / "second", text, train=start)
    (tmp_path / "first").rename(tmp_path / "gone")
    train(tmp_path / "second", text, train=start | {"steps": 2})
    assert load_run(tmp_path / "second/tiny").step == 2
