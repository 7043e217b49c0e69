"""A recipe on a published model: what it takes from it, how long it runs, what it
leaves alone."""

import json

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.chat import render_chat
from maxlm.data.tokenizer.load import import_tokenizer, load_tokenizer
from maxlm.models.params import flatten_names
from maxlm.run.convert import convert
from maxlm.run.huggingface_sources import convert_sources
from maxlm.run.load import load_model, load_run
from maxlm.run.load_config import load_run_config
from maxlm.train.program import train_model
from maxlm.tune.program import tune_model
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")
WORDS = tiny.TEXT.split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Prompts and answers, a run, and the same as a Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("tune")
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(29):
            row = {
                "prompt": " ".join(WORDS[: 1 + i % 4]),
                "completion": " " + WORDS[i % 7],
            }
            file.write(json.dumps(row) + "\n")
    tiny.train(
        tiny.write_config(folder, tiny.write_text(folder / "text", 4)), "train.steps=1"
    )
    convert(folder / "tiny", folder / "published")
    return folder


def load(home, folder, *settings):
    tiny_settings = (
        f"folder={folder}",
        "data.seq_len=32",
        "data.batch_size=8",
        "compilation_cache=null",
        "task.examples_per_row=1",
        "task.validation_fraction=0.2",
        "sharding.max_unsharded=1",
        f"train.start_from={home / 'published'}",
        f"task.files=[{home / 'rows.jsonl'}]",
    )
    return load_run_config("sft_lora", [*tiny_settings, *settings])


@pytest.mark.more
@pytest.mark.heavy
def test_a_published_model_is_tuned_for_epochs(home, tmp_path):
    result = tune_model(load(home, tmp_path), epochs=4, say=lambda _: None)
    config = result.setup.config
    rows = 29 - round(29 * 0.2)
    assert config.train.steps == -(-4 * rows // 8)
    assert config.schedule.warmup_steps == config.train.steps // 10
    base, tuned = (
        load_run(path) for path in (tmp_path / "sft_lora/base", result.folder)
    )
    published = load_run(home / "tiny")
    assert config.model.attention == published.config.model.attention
    theirs, ours = (flatten_names(run.params) for run in (published, tuned))
    for name, value in flatten_names(base.params).items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    changed = [
        name for name in theirs if (np.asarray(ours[name]) != theirs[name]).any()
    ]
    assert changed
    assert all("kernel" in name for name in changed)
    check_adapter_alone(home, tmp_path, result.folder, ours)


def check_adapter_alone(home, folder, run, params):
    """A folder of PEFT's is a model to use, where its base is one here."""
    convert(run, folder / "adapter", adapter=True)
    with pytest.raises(
        MaxlmError, match=r"base_model_name_or_path=None, is no Hugging Face"
    ):
        load_model(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    named = {"base_model_name_or_path": str(home / "published")}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    (folder / "adapter" / "chat_template.jinja").write_text(
        "{{ messages[0].content }}!"
    )
    loaded = load_model(folder / "adapter")
    for name, value in flatten_names(loaded.params).items():
        np.testing.assert_allclose(value, params[name], atol=1e-6, err_msg=name)
    assert render_chat(loaded.tokenizer, [{"role": "user", "content": "the"}]) == "the!"


def test_what_cannot_run_is_refused_before_the_model_is_read(home, tmp_path):
    config = load(home, tmp_path / "new", "train.steps=3", "schedule.warmup_steps=5")
    with pytest.raises(
        MaxlmError, match="warmup_steps=5 is longer than the run of 3 steps"
    ):
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


@pytest.mark.more
def test_the_vocabulary_grows_for_special_tokens_whose_rows_are_trained(home, tmp_path):
    more = ("<|tool|>", "<|call|>", "<|result|>", "<|done|>", "<|ask|>")
    settings = f"tokenizer.extra_special_tokens={json.dumps(more)}", "train.steps=3"
    config = load(home, tmp_path, *settings, "schedule.warmup_steps=0")
    result = tune_model(config, say=lambda _: None)

    base, grown = load_run(home / "tiny"), load_run(tmp_path / "sft_lora" / "grown")
    old = base.tokenizer.vocab_size
    ids = [grown.tokenizer.special.ids[literal] for literal in more]
    assert ids == [*range(old, old + len(more))]
    assert grown.tokenizer.encode("".join(more), allow_special=True) == ids
    assert grown.tokenizer.encode("the <|tool|>") == base.tokenizer.encode(
        "the <|tool|>"
    )
    # 304 rows for 300 ids: five more want another 16.
    assert result.setup.config.model.vocab_size == 320
    for name, before in flatten_names(base.params).items():
        after = np.asarray(flatten_names(grown.params)[name])
        if before.shape == after.shape:
            np.testing.assert_array_equal(after, before)
            continue
        axis = before.shape.index(304)
        before, after = (np.moveaxis(np.asarray(x), axis, 0) for x in (before, after))
        np.testing.assert_array_equal(after[:old], before[:old])
        mean = before[:old].astype(np.float64).mean(0)
        np.testing.assert_allclose(after[old:], np.tile(mean, (20, 1)), atol=1e-7)

    adapter = result.setup.config.adapter
    assert (adapter.token_ids, adapter.token_head) == (tuple(ids), True)
    trained = flatten_names(result.state.params)
    for name in ("embedding.table", "head.kernel"):
        assert trained[f"{name}.token_rows"].shape == (5, 32)
    assert tune_model(config, say=lambda _: None).state.step == 3  # finds it all there
    convert(tmp_path / "sft_lora", tmp_path / "merged")
    values = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert values["vocab_size"] == 320
    done = convert(tmp_path / "sft_lora", tmp_path / "adapter", adapter=True)
    assert "resize_token_embeddings(320)" in done.notes[0]
    again = load_tokenizer(result.folder / "tokenizer")
    assert again.special.ids.keys() >= {*more}
    tokenizer = import_tokenizer(tmp_path / "adapter", eos=base.tokenizer.special.eos)
    assert tokenizer.encode("<|call|>", allow_special=True) == [ids[1]]


def test_training_refuses_special_tokens_that_its_tokenizer_lacks(home, tmp_path):
    settings = 'tokenizer.extra_special_tokens=["<|no|>"]', "schedule.warmup_steps=0"
    config = convert_sources(load(home, tmp_path, *settings, "train.steps=1"))
    with pytest.raises(MaxlmError, match=r"has no special token <\|no\|>"):
        train_model(config, say=lambda _: None)
