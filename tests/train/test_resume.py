"""What a run may go on from: checkpoints of older versions, and stores that still hold
what they held."""

import json
import shutil
from pathlib import Path

import pytest

from maxlm.cli.main import main
from maxlm.config import MaxlmError
from maxlm.data.documents.config import SourceConfig
from maxlm.data.store.build import append_store, build_store
from maxlm.data.store.store import TokenStore
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.train import train_tokenizer
from tests.train import tiny
from tests.train.tiny import train

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]

NEW = (
    ("temperature", "phases", "verify"),
    ("max_epochs", "store_segments", "keep", "cut"),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("resume") / "text")


@pytest.fixture
def path(tmp_path, text, compiled_once):
    """The config of a run that has taken 3 steps, of which a copy is beside it."""
    trained = Path(text).with_name("trained")
    parts = {"train": {"steps": 3}, "checkpoint": {"every_steps": 2}}
    parts["data"] = tiny.settings(tmp_path, text)["data"] | {"heldout_fraction": 0}
    parts["reporting"] = {"tensorboard": False}
    if not trained.exists():
        train(tiny.write_config(trained, text, **parts))
    shutil.copytree(trained / "tiny", tmp_path / "tiny")
    return tiny.write_config(tmp_path, text, **parts)


def test_a_checkpoint_of_an_older_version_is_gone_on_from(tmp_path, path):
    """One that knows nothing of settings that came after it, of stores, nor of its
    checksum."""
    file = tmp_path / "tiny/checkpoints/3/metadata/metadata"
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
    assert train(path, "train.steps=4")[0].start_step == 3
    with pytest.raises(MaxlmError, match=r"tokenizer\.chat=None became 'chatml'"):
        train(path, "tokenizer.chat=chatml", "train.steps=5")


def test_a_run_whose_checkpoints_are_gone_is_refused(tmp_path, path, monkeypatch):
    run, other = tmp_path / "tiny", tmp_path / "other"
    home, records, events = (
        run / n for n in ("checkpoints", "metrics.jsonl", "events.jsonl")
    )
    before = records.read_bytes()

    def refused(words, *settings):
        with pytest.raises(MaxlmError) as error:
            train(path, *settings)
        assert str(error.value) == words

    home.rename(tmp_path / "aside")
    gone = (
        f"{home}: no checkpoint is left, but one of step %d was saved; put it back; to "
        f"start "
        f"afresh, move {run} away, or set another name=..."
    )
    refused(gone % 3)
    assert records.read_bytes() == before
    lines = events.read_text().splitlines(keepends=True)

    # Another run goes on from them, and is stopped before it has any of its own.
    (tmp_path / "aside").rename(home)
    with monkeypatch.context() as patch:
        patch.setattr(
            "maxlm.run.rollout_source.open_training_batches", lambda *_, **__: 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            train(path, "name=other", "train.steps=4", resume=run)
    refused(
        f"{other}/checkpoints: no checkpoint is here, and the run resumes from {run}; "
        f"give "
        f"--resume {run} again; to start afresh, move {other} away, or set another "
        f"name=...",
        "name=other",
    )

    # One that was killed in its first save has lost nothing that could be gone on from.
    shutil.rmtree(home)
    first = next(i for i, line in enumerate(lines) if '"checkpoint"' in line)
    events.write_text("".join(lines[: first + 1]))
    assert train(path, "train.steps=1")[0].start_step == 0


def test_a_store_is_read_as_it_was_when_it_grows_and_another_is_refused(tmp_path):
    """The other has other texts of the same lengths."""
    path, store, texts = build_alike(tmp_path)
    train(path)
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "new", store)
    with pytest.raises(
        MaxlmError, match="the store of source 'text' is not what it was"
    ):
        train(path, "train.steps=2")
    shutil.rmtree(store)
    shutil.copytree(tmp_path / "old", store)
    append_store(texts["new"], store, workers=1)
    with pytest.raises(MaxlmError) as error:
        train(path, "train.steps=2")
    assert "the store of source 'text' is not what it was (40 documents, " in str(
        error.value
    )
    assert str(error.value).endswith(
        "; set store_segments: 1 for it, or train in another run folder"
    )
    grown = "data.sources.0.store_segments=1"
    assert train(path, "train.steps=2", grown)[0].start_step == 1
    # Both were read: the newest checkpoint is again one of the first segment.
    with pytest.raises(MaxlmError, match="set store_segments: 1"):
        train(path, "train.steps=3", "data.sources.0.store_segments=2")


def build_alike(folder):
    """Two stores of other texts of the same lengths; returns a run's config that reads
    the old."""
    for name, letter in (("old", "a"), ("new", "b")):
        (folder / f"{name}.jsonl").write_text(f'{{"text": "{letter * 40}"}}\n' * 40)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=257), [b"a"])
    tokenizer.save(folder / "tokenizer")
    texts = {
        n: SourceConfig(documents=(str(folder / f"{n}.jsonl"),)) for n in ("old", "new")
    }
    for name, source in texts.items():
        build_store(source, folder / "tokenizer", folder / name, workers=1)
    store = shutil.copytree(folder / "old", folder / "store")
    data = {
        "sources": [{"name": "text", "store": str(store)}],
        "seq_len": 32,
        "batch_size": 8,
    }
    path = tiny.write_config(
        folder,
        "unused",
        train={"steps": 1},
        tokenizer={"path": str(folder / "tokenizer")},
        data=data | {"workers": 0},
        reporting={"tensorboard": False},
    )
    return path, store, texts


@pytest.mark.more
def test_a_run_told_to_verify_refuses_another_stores_tokens(tmp_path):
    """Which the store reads as its own without; a store of before is told of once."""
    path, store, _ = build_alike(tmp_path)
    shutil.copyfile(tmp_path / "new/tokens/c/0", store / "tokens/c/0")
    message = r"store/tokens/c/0: this file has changed since it was written; put the store back"
    with pytest.raises(MaxlmError, match=message):
        train(path, "data.verify=true")
    train(path)
    shutil.copyfile(tmp_path / "old/tokens/c/0", store / "tokens/c/0")
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["segments"][0]["checksums_sha256"], manifest["sha256"]
    (store / "manifest.json").write_text(json.dumps(manifest))
    _, lines = train(path, "data.verify=true")
    assert (
        len([line for line in lines if "segment 0 without checksums of files" in line])
        == 1
    )


def test_what_mix_prepared_is_for_its_config_alone(tmp_path, capfd):
    """Weights and phases may be tried, and then trained; other text is refused."""
    texts = [
        tiny.write_text(tmp_path / name, seed=i)
        for i, name in enumerate(("old", "new"))
    ]
    path = tiny.write_config(tmp_path, texts[0])
    assert main(["corpus", "mix", path, "--json"]) == 0
    (usage,) = json.loads(capfd.readouterr().out)
    store = TokenStore.open(tmp_path / "tiny" / "data" / "text" / "train")
    assert (usage["source"], usage["sequences"], usage["share"]) == ("text", 20 * 8, 1)
    epochs = usage["sequences"] / -(-store.num_tokens // 32)
    assert (usage["epochs"], usage["tokens"]) == (
        epochs,
        round(epochs * store.num_tokens),
    )
    phases = "data.phases=[{from_step: 5, ramp_steps: 5, weights: {text: 2}}]"
    tried = ["corpus", "mix", path, "data.sources.0.max_epochs=500", phases]
    assert main(tried) == 0
    table = capfd.readouterr().out
    assert [
        steps in table for steps in ("0 to 4", "5 to 9", "10 to 19", "all steps")
    ] == [True] * 4
    other = f"data.sources.0.documents=[{texts[1]}]"
    assert main(["corpus", "mix", path, other]) == 2
    assert (
        "the text here was prepared with another config: data.sources"
        in capfd.readouterr().err
    )
    with pytest.raises(
        MaxlmError, match=r"prepared with another config: data\.sources"
    ):
        train(path, other)
    train(
        path,
        "data.sources.0.weight=2",
        "data.sources.0.max_epochs=500",
        "train.steps=1",
    )


def test_a_run_leaves_nothing_of_text_that_it_refuses(tmp_path):
    path = tiny.write_config(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(MaxlmError):
        train(path)
    assert main(["corpus", "mix", path]) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.yaml"]
