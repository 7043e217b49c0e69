"""What a run may go on from: checkpoints of older versions, and stores that still hold what they
held."""

import json
import shutil

import pytest
import yaml

from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.data.documents import SourceConfig
from maxlm.data.store import append_store, build_store
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from tests.programs import tiny
from tests.programs.tiny import train

pytestmark = pytest.mark.usefixtures("compiled_once")

NEW = ("temperature", "phases"), ("max_epochs", "store_segments", "keep", "cut")


def saved_metadata(run, step):
    (path,) = (run / "checkpoints" / str(step)).rglob("metadata/metadata")
    return path


def test_a_checkpoint_of_an_older_version_is_gone_on_from(tmp_path):
    """One that knows nothing of settings that came after it, of stores, nor of its checksum."""
    path = tiny.write_config(tmp_path, tiny.write_text(tmp_path / "text"), train={"steps": 1})
    train(path)
    file = saved_metadata(tmp_path / "tiny", 1)
    metadata = json.loads(file.read_text())
    data, tokenizer = metadata["config"]["data"], metadata["config"]["tokenizer"]
    for part, names in (
        (data, NEW[0]),
        (data["sources"][0], NEW[1]),
        (tokenizer, ("chat", "lowercase")),
        (metadata, ("stores", "sha256")),
        (metadata["versions"], ("maxlm",)),
    ):
        for name in names:
            del part[name]
    file.write_text(json.dumps(metadata))
    assert train(path, "train.steps=2")[0].start_step == 1
    with pytest.raises(MaxlmError, match=r"tokenizer\.chat=None became 'chatml'"):
        train(path, "tokenizer.chat=chatml", "train.steps=3")


def test_a_run_whose_checkpoints_are_gone_is_refused(tmp_path, monkeypatch):
    text = tiny.write_text(tmp_path / "text")
    path = tiny.write_config(tmp_path, text, train={"steps": 3}, checkpoint={"every_steps": 2})
    train(path)
    run, other = tmp_path / "tiny", tmp_path / "other"
    home, records, events = (run / n for n in ("checkpoints", "metrics.jsonl", "events.jsonl"))
    before = records.read_bytes()

    def refused(words, *settings):
        with pytest.raises(MaxlmError) as error:
            train(path, *settings)
        assert str(error.value) == words

    home.rename(tmp_path / "aside")
    gone = (
        f"{home}: no checkpoint is left, but one of step %d was saved; put it back; to start "
        f"afresh, move {run} away, or set another name=..."
    )
    refused(gone % 3)
    assert records.read_bytes() == before
    lines = events.read_text().splitlines(keepends=True)

    # Another run goes on from them, and is stopped before it has any of its own.
    (tmp_path / "aside").rename(home)
    with monkeypatch.context() as patch:
        patch.setattr("maxlm.programs.train.open_training_batches", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(path, "name=other", "train.steps=4", resume=run)
    refused(
        f"{other}/checkpoints: no checkpoint is here, and the run resumes from {run}; give "
        f"--resume {run} again; to start afresh, move {other} away, or set another name=...",
        "name=other",
    )

    # One that was killed in its first save has lost nothing that could be gone on from.
    shutil.rmtree(home)
    first = next(i for i, line in enumerate(lines) if '"checkpoint"' in line)
    events.write_text("".join(lines[: first + 1]))
    assert train(path, "train.steps=1")[0].start_step == 0


def config_of_store(folder):
    return tiny.write_config(
        folder,
        "unused",
        train={"steps": 1},
        tokenizer={"path": str(folder / "tokenizer")},
        data={
            "sources": [{"name": "text", "store": str(folder / "store")}],
            "seq_len": 32,
            "batch_size": 8,
            "workers": 0,
        },
    )


def test_a_store_of_other_texts_of_the_same_lengths_is_another(tmp_path):
    for name, letter in (("old", "a"), ("new", "b")):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{letter * 40}"}}\n' * 40)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=257), [b"a"])
    tokenizer.save(tmp_path / "tokenizer")
    for name in ("old", "new"):
        source = SourceConfig(documents=(str(tmp_path / f"{name}.jsonl"),))
        build_store(source, tmp_path / "tokenizer", tmp_path / name)
    path = config_of_store(tmp_path)
    shutil.copytree(tmp_path / "old", tmp_path / "store")
    train(path)
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(tmp_path / "new", tmp_path / "store")
    with pytest.raises(MaxlmError, match="the store of source 'text' is not what it was"):
        train(path, "train.steps=2")


def test_a_store_that_grew_is_read_as_it_was(tmp_path):
    texts = [tiny.write_text(tmp_path / name, seed=i) for i, name in enumerate(("old", "new"))]
    words = [path.read_bytes() for path in sorted((tmp_path / "old").iterdir())]
    train_tokenizer(TokenizerConfig(vocab_size=300), words).save(tmp_path / "tokenizer")
    build_store(SourceConfig(documents=(texts[0],)), tmp_path / "tokenizer", tmp_path / "store")
    path = config_of_store(tmp_path)
    train(path)
    append_store(SourceConfig(documents=(texts[1],)), tmp_path / "store", workers=1)
    with pytest.raises(MaxlmError) as error:
        train(path, "train.steps=2")
    assert "the store of source 'text' is not what it was (12 documents, " in str(error.value)
    assert str(error.value).endswith(
        "; set store_segments: 1 for it, or train in another run folder"
    )
    grown = "data.sources.0.store_segments=1"
    assert train(path, "train.steps=2", grown)[0].start_step == 1
    # Both were read: the newest checkpoint is again one of the first segment.
    with pytest.raises(MaxlmError, match="set store_segments: 1"):
        train(path, "train.steps=3", "data.sources.0.store_segments=2")


def test_mix_prepares_for_its_config_alone(tmp_path, capfd):
    """Weights may be tried; other text is refused, by itself and by a run."""
    texts = [tiny.write_text(tmp_path / name, seed=i) for i, name in enumerate(("old", "new"))]
    path = tiny.write_config(tmp_path, texts[0])
    assert main(["corpus", "mix", path, "data.sources.0.weight=2"]) == 0
    assert main(["corpus", "mix", path, "data.sources.0.max_epochs=500"]) == 0
    written = yaml.safe_load((tmp_path / "tiny" / "config.yaml").read_text())
    assert written["data"]["sources"][0]["documents"] == [texts[0]]
    capfd.readouterr()
    other = f"data.sources.0.documents=[{texts[1]}]"
    assert main(["corpus", "mix", path, other]) == 2
    assert "the text here was prepared with another config: data.sources" in capfd.readouterr().err
    with pytest.raises(MaxlmError, match="the text here was prepared with another config"):
        train(path, other)


def test_mix_leaves_nothing_of_what_it_refuses(tmp_path, capfd):
    path = tiny.write_config(tmp_path, str(tmp_path / "nowhere"))
    assert main(["corpus", "mix", path]) == 2
    assert [each.name for each in tmp_path.iterdir()] == ["tiny.yaml"]
