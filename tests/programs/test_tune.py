"""A recipe on a published model: what it takes from it, how long it runs, what it leaves alone."""

import json

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.models.params import flatten_names
from maxlm.programs.convert import convert
from maxlm.programs.load import load_run
from maxlm.programs.run_config import load_run_config
from maxlm.programs.tune import tune_model
from tests.programs import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")
WORDS = tiny.TEXT.split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompts and answers, a run, and the same as a Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("tune")
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(29):
            row = {"prompt": " ".join(WORDS[: 1 + i % 4]), "completion": " " + WORDS[i % 7]}
            file.write(json.dumps(row) + "\n")
    tiny.train(tiny.write_config(folder, tiny.write_text(folder / "text", 4)), "train.steps=1")
    convert(folder / "tiny", folder / "published")
    return folder


def load(home, folder, *settings):
    own = f"folder={folder}", "data.seq_len=32", "data.batch_size=8", "compilation_cache=null"
    own += "task.examples_per_row=1", "task.validation_fraction=0.2", "sharding.max_unsharded=1"
    own += f"train.start_from={home / 'published'}", f"task.files=[{home / 'rows.jsonl'}]"
    return load_run_config("sft_lora", [*own, *settings])


def test_a_published_model_is_tuned_for_epochs(home, tmp_path):
    result = tune_model(load(home, tmp_path), epochs=4, say=lambda _: None)
    config = result.setup.config
    rows = 29 - round(29 * 0.2)
    assert config.train.steps == -(-4 * rows // 8)
    assert config.schedule.warmup_steps == config.train.steps // 10
    base, tuned = (load_run(path) for path in (tmp_path / "sft_lora/base", result.folder))
    published = load_run(home / "tiny")
    assert config.model.attention == published.config.model.attention
    theirs, ours = (flatten_names(run.params) for run in (published, tuned))
    for name, value in flatten_names(base.params).items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    changed = [name for name in theirs if (np.asarray(ours[name]) != theirs[name]).any()]
    assert changed
    assert all("kernel" in name for name in changed)


def test_what_cannot_run_is_refused_before_the_model_is_read(home, tmp_path):
    config = load(home, tmp_path / "new", "train.steps=3", "schedule.warmup_steps=5")
    with pytest.raises(MaxlmError, match="warmup_steps=5 is longer than the run of 3 steps"):
        tune_model(config)
    assert not (tmp_path / "new").exists()


def test_a_recipe_wants_a_model_that_is_there(tmp_path):
    with pytest.raises(MaxlmError, match="no model, and none to start from"):
        load_run_config("sft_lora", ["task.files=[rows.jsonl]"])
    with pytest.raises(MaxlmError, match="none: no such folder"):
        load_run_config("sft_lora", [f"train.start_from={tmp_path / 'none'}"])
    for wrong in ("train=3", "model=llama", "train.start_from=3"):
        with pytest.raises(MaxlmError, match=wrong.partition("=")[0]):
            load_run_config("demo", [wrong])
