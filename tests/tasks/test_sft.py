"""Supervised fine-tuning on rows of files: what the loss counts, packing,
micro-batches, rows that are cut or left out, validation, resuming."""

import json
import shutil

import jax
import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.load import load_tokenizer
from maxlm.data.tokenizer.train import train_tokenizer
from maxlm.models.params import bind
from maxlm.run.config import RunConfig
from maxlm.run.global_batch import make_global_batch
from maxlm.run.setup import set_up_run
from maxlm.sharding import MeshConfig, bind_mesh
from maxlm.tasks import SourceInputs, TaskModels, rows
from maxlm.train.program import train_model
from tests.train import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")
pytest.importorskip("jinja2")
SEQ = 128


def make_rows(count, seed=0):
    random = np.random.default_rng(seed)
    words = tiny.TEXT.split()
    talks = []
    for _ in range(count):
        sizes = random.integers(1, 5, 2 * random.integers(1, 3))
        texts = [" ".join(random.choice(words, size)) for size in sizes]
        roles = ["user", "assistant"] * (len(texts) // 2)
        turns = zip(roles, texts, strict=True)
        talks.append(
            {"messages": [{"role": role, "content": text} for role, text in turns]}
        )
    return talks


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tokenizer and rows."""
    folder = tmp_path_factory.mktemp("sft")
    special = {"chat": "chatml", "eos": "<|im_end|>"}
    texts = [tiny.TEXT * 9, "user assistant\n" * 9]
    train_tokenizer(TokenizerConfig(vocab_size=300, **special), texts).save(
        folder / "tokenizer"
    )
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, make_rows(24))))
    return folder


def make_config(home, folder, name="sft", task=(), **parts):
    settings = tiny.settings(folder, "") | {"name": name}
    settings["model"] |= {"max_seq_len": SEQ}
    settings["data"] = {"seq_len": SEQ, "batch_size": 16, "workers": 0}
    settings["tokenizer"] = {"path": str(home / "tokenizer")}
    settings["task"] = {
        "kind": "sft",
        "files": [str(home / "rows.jsonl")],
        **dict(task),
    }
    settings |= {"train": {"steps": 4}, "checkpoint": {"every_steps": 2}}
    settings |= {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}
    settings |= {"reporting": {"tensorboard": False}}
    return RunConfig.model_validate(settings | parts)


def make_inputs(config):
    tokenizer = load_tokenizer(config.tokenizer.path)
    return SourceInputs(config.data, config.seed, None, tokenizer)  # type: ignore[arg-type]


def compute_loss_and_gradient(config, batch):
    """Of rows [B, S], summed; with the same parameters each time."""
    setup = set_up_run(
        config.model_copy(update={"mesh": MeshConfig()}), jax.devices()[:1]
    )
    num_rows = len(batch["tokens"])
    put = make_global_batch(
        batch,
        setup.config.task.batch_arrays(SEQ),
        range(num_rows),
        setup.placed.compute,
        setup.mesh,
        (1, num_rows),
        setup.token_order,
    )
    put = {name: array[0] for name, array in put.items()}

    def loss(params, put):
        models = TaskModels(bind(setup.model, params))
        return setup.config.task.loss(models, put, jax.random.key(0))[0]

    run = bind_mesh(setup.mesh, jax.jit(jax.value_and_grad(loss)))
    return jax.device_get(run(setup.init_train_state().params, put))


@pytest.mark.heavy
def test_labels_of_prompts_do_not_matter(home, tmp_path):
    config = make_config(home, tmp_path)
    batch = config.task.batch_source(make_inputs(config)).rows(0, range(4))
    unlearnt = (batch["weights"] == 0) & (batch["segment_ids"] > 0)
    assert 20 < unlearnt.sum() < (batch["segment_ids"] > 0).sum()
    other = {**batch, "targets": np.where(unlearnt, 7, batch["targets"])}
    assert (other["targets"] != batch["targets"]).any()
    loss, gradient = compute_loss_and_gradient(config, batch)
    same, again = compute_loss_and_gradient(config, other)
    assert loss == same
    jax.tree.map(np.testing.assert_array_equal, gradient, again)


@pytest.mark.heavy
def test_packed_rows_give_what_rows_of_their_own_do(home, tmp_path):
    results = []
    for most in (None, 1):
        data = {"seq_len": SEQ, "batch_size": 24, "workers": 0}
        config = make_config(home, tmp_path, task={"examples_per_row": most}, data=data)
        source = config.task.batch_source(make_inputs(config))
        batch = source.rows(0, range(source.rows_per_epoch))
        results.append(
            (source.rows_per_epoch, *compute_loss_and_gradient(config, batch))
        )
    (packed, loss, gradient), (single, want, expected) = results
    assert packed < single / 2
    assert loss == pytest.approx(want, rel=1e-6)
    scale = max(np.abs(x).max() for x in jax.tree.leaves(expected))
    for got, one in zip(*map(jax.tree.leaves, (gradient, expected)), strict=True):
        np.testing.assert_allclose(got, one, atol=1e-6 * scale)


@pytest.mark.more
def test_micro_batches_of_unequal_lengths_are_one_batch(home, tmp_path):
    records = []
    for parts in (1, 4):
        train = {"steps": 2, "micro_batches": parts}
        config = make_config(
            home, tmp_path, f"m{parts}", {"examples_per_row": 1}, train=train
        )
        folder = train_model(config, say=lambda _: None).folder
        records.append(tiny.read_metrics(folder))
    for one, four in zip(*records, strict=True):
        assert one["tokens"] == four["tokens"]
        for name in ("loss", "grad_norm"):
            assert four[name] == pytest.approx(one[name], rel=1e-6)


def make_source(home, folder, lengths, **task):
    """A source of prompts of "a" and completions of "b", so many words each."""
    lines = [
        {"prompt": "a " * num_prompt, "completion": "b " * num_completion}
        for num_prompt, num_completion in lengths
    ]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = make_config(
        home, folder, task={"files": [str(folder / "own.jsonl")], **task}
    )
    return config.task.batch_source(make_inputs(config))


def test_long_rows_are_cut_or_left_out_by_the_rule_and_counted(home, tmp_path):
    sizes = [(2, 3), (1, 1), (12, 12), (3, 30), (40, 1)]
    encode = load_tokenizer(home / "tokenizer").encode
    is_long = [len(encode("a " * a + "b " * b)) + 2 > 20 for a, b in sizes]
    assert is_long == [False, False, True, True, True]
    dropped = make_source(home, tmp_path, sizes, max_length=20)
    why = "longer than 20 tokens (task.too_long=drop)"
    assert dropped.notes == (f"3 of 5 rows are left out: {why}",)
    assert sorted(dropped.example_indices) == [0, 1]
    cut = make_source(home, tmp_path, sizes, max_length=20, too_long="cut_end")
    # Of the last no token to learn is left.
    assert cut.notes[0].startswith(
        "2 of 5 rows are cut to 20 tokens (task.too_long=cut_end)"
    )
    assert cut.notes[1].startswith(
        "1 of 5 rows are left out: no token to learn among the 20"
    )
    end = make_source(home, tmp_path, sizes, max_length=20, too_long="cut_start")
    assert end.notes == ("3 of 5 rows are cut to 20 tokens (task.too_long=cut_start)",)
    with pytest.raises(
        MaxlmError, match=r"own\.jsonl: 5 of 5 rows are left out: longer than 2"
    ):
        make_source(home, tmp_path, sizes, max_length=2)


def test_a_fault_names_the_file_and_the_row(home, tmp_path):
    with pytest.raises(
        MaxlmError, match=r"own\.jsonl: row 1: an empty completion; leave"
    ):
        make_source(home, tmp_path, [(1, 1), (2, 0)])


@pytest.mark.more
@pytest.mark.heavy
def test_refused_rows_end_a_run_or_are_left_out_and_listed(home, tmp_path):
    lines = [*map(json.dumps, make_rows(24)), '{"messages": [', '{"messages": []}']
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(lines))
    task = {"files": [str(path)]}
    data = {"seq_len": SEQ, "batch_size": 16, "workers": 0}
    parts = {"train": {"steps": 1}, "data": data}
    with pytest.raises(MaxlmError, match=r"own\.jsonl: row 24: no JSON object"):
        train_model(
            make_config(home, tmp_path, "stops", task, **parts), say=lambda _: None
        )
    data["on_bad_rows"] = "skip"
    messages = []
    folder = train_model(
        make_config(home, tmp_path, "skips", task, **parts), say=messages.append
    ).folder
    (note,) = [message for message in messages if "refused" in message]
    counted = (
        "training: 2 of 26 rows are refused and left out (data.on_bad_rows=skip): "
    )
    assert note.startswith(f"{counted}{path}: row 24: no JSON object")
    records = [json.loads(line) for line in (folder / "refused_rows.jsonl").open()]
    assert [record["where"] for record in records] == [
        f"{path}: row {i}" for i in (24, 25)
    ]
    assert records[1]["fault"] == "no list of messages"


@pytest.mark.heavy
def test_many_rows_are_encoded_in_processes_alike(home, tmp_path, monkeypatch, capfd):
    config = make_config(home, tmp_path)
    inputs = make_inputs(config)
    alone = config.task.batch_source(inputs)
    monkeypatch.setattr(rows, "_MANY_ROWS", 1)
    monkeypatch.setattr(rows, "_PART_ROWS", 5)
    pooled = SourceInputs(**{**vars(inputs), "build_workers": 2})
    spread = config.task.batch_source(pooled)
    assert "encoding rows: 24 of 24 rows" in capfd.readouterr().err
    for name in ("example_indices", "row_offsets"):
        np.testing.assert_array_equal(getattr(spread, name), getattr(alone, name))


@pytest.mark.parametrize(
    ("fraction", "size"), [(0.25, 6), (0.001, 1), (0.99, 23), (0, 0)]
)
def test_validation_rows_are_others_than_those_trained_on(
    home, tmp_path, fraction, size
):
    config = make_config(home, tmp_path, task={"validation_fraction": fraction})
    inputs = make_inputs(config)
    training = config.task.batch_source(inputs).example_indices
    sources = config.task.evaluation_sources(inputs)
    heldout = sources["validation"].example_indices if sources else np.arange(0)
    assert heldout.size == size
    assert sorted([*training, *heldout]) == list(range(24))
    assert not sources or sources["validation"].num_steps is not None


@pytest.mark.heavy
def test_a_run_resumes_bit_for_bit_and_says_what_is_left_out(home, tmp_path):
    lines = []
    task = {"validation_fraction": 0.25, "max_length": 40}
    whole = train_model(make_config(home, tmp_path, "whole", task), say=lines.append)
    notes = [line for line in lines if "rows are left out: longer than 40" in line]
    assert notes[0].startswith("training: ")
    losses = [
        record["loss"] for record in tiny.read_metrics(whole.folder) if "loss" in record
    ]
    assert losses[-1] < losses[0]
    cut = shutil.copytree(whole.folder, whole.folder.with_name("cut"))
    shutil.rmtree(cut / "checkpoints" / "4")
    again = train_model(make_config(home, tmp_path, "cut", task), say=lambda _: None)
    assert again.start_step == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.state, again.state))


@pytest.mark.more
@pytest.mark.heavy
def test_a_runs_own_tokenizer_gets_the_template_that_is_named(home, tmp_path):
    base = load_tokenizer(home / "tokenizer")
    base.extra_files.clear()
    base.save(tmp_path / "base")
    tokenizer = {"path": str(tmp_path / "base")}
    parts = {"tokenizer": tokenizer, "train": {"steps": 1}}
    config = make_config(home, tmp_path, "bare", **parts)
    with pytest.raises(
        MaxlmError, match=r"row 0: .* no chat template; set tokenizer\.chat"
    ):
        train_model(config, say=lambda _: None)
    config = make_config(
        home,
        tmp_path,
        "own",
        tokenizer=tokenizer | {"chat": "chatml"},
        train={"steps": 1},
    )
    run = train_model(config, say=lambda _: None)
    assert "chat_template.jinja" in load_tokenizer(run.folder / "tokenizer").extra_files
    assert not load_tokenizer(tmp_path / "base").extra_files
