"""A teacher's files: what is stored beside rows trains a student as the teacher itself
does, and its answers are those of the engine."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from maxlm.config import MaxlmError
from maxlm.config.sampling import SamplingConfig
from maxlm.data.row_files import open_rows
from maxlm.inference.text import search_text
from maxlm.run.load import load_run
from maxlm.serving.program import make_engine
from maxlm.tune.teachers import generate_answers, store_teacher_logits
from tests.train import tiny

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("compiled_once")]
QUIET = {"reporting": {"tensorboard": False}}
VOCAB = 304


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a teacher's run, ``tiny``, and rows."""
    folder = tmp_path_factory.mktemp("distil")
    text = tiny.write_text(folder / "text")
    settings = tiny.write_config(folder, text, **QUIET, train={"steps": 6})
    tiny.train(settings, "data.heldout_fraction=0", "compute_dtype=float32")
    words = tiny.TEXT.split()
    rows = [
        {
            "prompt": " ".join(words[i : i + 2]),
            "completion": " " + " ".join(words[i % 5 : 3 + i % 7]),
        }
        for i in range(9)
    ]
    rows[3]["completion"] *= 40  # too long
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train_student(home, name, *settings, **task):
    folder = home / name
    student = tiny.settings(folder, "")
    student["model"] |= {"d_model": 24, "num_layers": 1}
    student["data"] = student["data"] | {"sources": [], "heldout_fraction": 0.0}
    student |= {
        "tokenizer": {"path": str(home / "tiny/tokenizer")},
        "compute_dtype": "float32",
    }
    student |= {"train": {"steps": 3}, "task": {"kind": "distill"} | task, **QUIET}
    folder.mkdir()
    (folder / "run.yaml").write_text(json.dumps(student))
    result, _ = tiny.train(folder / "run.yaml", *settings)
    return [(r["loss"], r["divergence"]) for r in tiny.read_metrics(result.folder)]


@pytest.mark.more
def test_all_log_probabilities_stored_are_the_teacher(home):
    teacher = home / "tiny"
    rows = str(home / "rows.jsonl")
    counts = store_teacher_logits(str(teacher), [rows], home / "all.arrow", k=VOCAB + 5)
    assert counts == (8, 1)
    live = train_student(
        home, "live", teacher=str(teacher), files=[rows], temperature=1.0
    )
    stored = train_student(home, "stored", files=[str(home / "all.arrow")], top_k=VOCAB)
    np.testing.assert_allclose(stored, live, rtol=1e-6)
    # Fewer, at another temperature, on a mesh.
    k = 7
    temperature = 2.0
    store_teacher_logits(
        str(teacher),
        [rows],
        home / "few.arrow",
        k=k,
        temperature=temperature,
        mesh="fsdp=2,tensor=2",
    )
    first, few = (open_rows(home / f"{name}.arrow")[2] for name in ("all", "few"))
    assert few["prompt"] == first["prompt"]
    size = len(first["teacher_targets"]) // 4  # int32 each
    # [size, VOCAB + 1], likeliest first; the last column is of all that is left out.
    whole = np.frombuffer(first["teacher_log_probs"], np.float32)
    whole = whole.reshape(size, VOCAB + 1)
    assert (whole[:, -1] == -np.inf).all()
    order = np.frombuffer(first["teacher_ids"], np.int32).reshape(size, VOCAB)
    # Log-probabilities at another temperature, from all of those at 1.
    logits = np.zeros((size, VOCAB))
    np.put_along_axis(logits, order, whole[:, :VOCAB] / temperature, 1)
    want = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.frombuffer(few["teacher_ids"], np.int32).reshape(size, k)
    stored = np.frombuffer(few["teacher_log_probs"], np.float32).reshape(size, k + 1)
    np.testing.assert_allclose(
        stored[:, :k], np.take_along_axis(want, ids, 1), atol=1e-4
    )
    np.testing.assert_allclose(np.exp(stored).sum(1), 1, atol=1e-5)


@pytest.mark.more
def test_a_teacher_with_another_vocabulary_or_tokenizer_is_refused(home):
    teacher, rows = str(home / "tiny"), str(home / "rows.jsonl")
    with pytest.raises(
        MaxlmError, match=r"tiny: the teacher has 304 ids, model\.vocab_size=320"
    ):
        train_student(
            home, "larger", "model.vocab_size=320", teacher=teacher, files=[rows]
        )
    other = tiny.write_text(home / "other-text", seed=5)
    settings = tiny.write_config(home / "other", other, **QUIET, train={"steps": 1})
    tiny.train(settings, "data.heldout_fraction=0", "tokenizer.vocab_size=290")
    with pytest.raises(
        MaxlmError, match="'teacher' was trained with another tokenizer"
    ):
        train_student(home, "strange", teacher=str(home / "other/tiny"), files=[rows])


@pytest.mark.more
def test_a_student_of_text_learns_features_from_a_run_it_started_from(home, tmp_path):
    shutil.copytree(home / "tiny", tmp_path / "teacher")
    text = home / "text"
    task = {
        "kind": "distill_text",
        "teacher": str(tmp_path / "teacher"),
        "features": 32,
    }
    config = tiny.write_config(
        tmp_path,
        str(text),
        task=task,
        train={"steps": 2, "start_from": str(home / "tiny")},
        **QUIET,
    )
    overrides = (
        "data.heldout_fraction=0",
        "compute_dtype=float32",
        "model.heads.features=32",
        f"tokenizer.path={home / 'tiny/tokenizer'}",
    )
    result, _ = tiny.train(config, *overrides)
    first = tiny.read_metrics(result.folder)[0]
    assert first["divergence"] == pytest.approx(0, abs=1e-5)
    assert first["features"] > 0.1  # the map is new


@pytest.mark.more
def test_answers_are_the_engines(home, tmp_path, monkeypatch):
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=6)
    settings = [
        "max_sequences=4",
        "max_chunks=1",
        "decode_steps=1",
        "prefill_tokens=16",
    ]
    rows, out = home / "rows.jsonl", tmp_path / "answers.jsonl"
    model = str(home / "tiny")
    cut = generate_answers(
        model, [rows], tmp_path / "none.jsonl", settings=settings, sampling=sampling
    )
    assert sum(cut) == 9

    def make_ending_engine(loaded, settings, *, warm_up):
        """An engine whose answers end by themselves, also those cut at a length."""
        engine = make_engine(loaded, settings, warm_up=warm_up)
        run = engine.run
        engine.run = lambda requests: (
            replace(output, finish_reason=output.finish_reason and "stop")
            for output in run(requests)
        )
        return engine

    monkeypatch.setattr("maxlm.tune.teachers.make_engine", make_ending_engine)
    written, left_out = generate_answers(
        model, [rows], out, settings=settings, sampling=sampling
    )
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert (len(answers), written + left_out) == (written, 9)
    assert written > max(4, cut[0])
    loaded = load_run(home / "tiny")
    prompts = [row["prompt"] for row in answers[:3]]
    results = search_text(
        loaded.model,
        loaded.params,
        loaded.tokenizer,
        prompts,
        sampling,
        num_beams=None,
    )
    expected = [texts[i] for i, texts in enumerate(results)]
    assert [row["completion"] for row in answers[:3]] == expected
