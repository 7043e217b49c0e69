"""Rows of public files in the official prompts: as the official rows give them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval.tasks
import pytest
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

from maxlm.config import MaxlmError
from maxlm.evaluation.tasks import (
    _find_fewshot_split,
    check_task_names,
    evaluate_tasks,
    load_tasks,
)

FOLDERS = (
    "arc",
    "piqa",
    "openbookqa",
    "winogrande",
    "lambada",
    "hellaswag",
    "gsm8k",
    "gpqa",
)
FOLDERS += ("mmlu/default", "truthfulqa", "mmlu_pro", "minerva_math")


@pytest.fixture(scope="module")
def manager():
    root = Path(lm_eval.tasks.__file__).parent
    paths = [root / folder for folder in FOLDERS]
    return TaskManager(include_path=paths, include_defaults=False)


def write(path: Path, *rows: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_prompt(manager, name, folder, shots=None):
    """Text, choices and target of a task's first row."""
    loaded = load_tasks([name], data=folder, shots=shots, manager=manager)[name]
    (task,) = loaded["tasks"].values()
    row = task.eval_docs[0]
    choices = task.doc_to_choice(row) if task.config.doc_to_choice else None
    return task.doc_to_text(row), choices, task.doc_to_target(row)


CHOICES = {"text": ["red", "a hen", "up"], "label": ["A", "B", "C"]}
STEM = {"stem": "Which lays?", "choices": [{"text": "red", "label": "A"}]}
FORMS = {
    # llm-foundry's rows, and those of the official dataset
    "arc_easy": (
        {"query": "Question: Which lays?", "choices": CHOICES["text"], "gold": 1},
        {"id": "x", "question": "Which lays?", "choices": CHOICES, "answerKey": "B"},
    ),
    "openbookqa": (
        {"query": "What lays is", "choices": CHOICES["text"], "gold": 1},
        {
            "id": "x",
            "question_stem": "What lays is",
            "choices": CHOICES,
            "answerKey": "B",
        },
    ),
    "piqa": (
        {
            "query": "Question: boil an egg\n",
            "choices": ["in a pan", "in a hat"],
            "gold": 0,
        },
        {"goal": "boil an egg", "sol1": "in a pan", "sol2": "in a hat", "label": 0},
    ),
    "winogrande": (
        {
            "context_options": ["Ann saw Mary as Mary", "Ann saw Mary as Maria"],
            "continuation": "sang.",
            "gold": 1,
        },
        {
            "sentence": "Ann saw Mary as _ sang.",
            "option1": "Mary",
            "option2": "Maria",
            "answer": "2",
        },
    ),
    "lambada_openai": (
        {"context": "He rang the", "continuation": "bell"},
        {"text": "He rang the bell"},
    ),
    "hellaswag": (
        {
            "query": "Egg: A man boils. he",
            "choices": ["sits", "eats", "lays", "is"],
            "gold": 2,
        },
        {
            "activity_label": "Egg",
            "ctx_a": "A man boils.",
            "ctx_b": "he",
            "ctx": "A man boils. he",
            "endings": ["sits", "eats", "lays", "is"],
            "label": "2",
        },
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_public_form_gives_the_official_prompt(name, manager, tmp_path):
    public, official = FORMS[name]
    split = "validation" if name in ("piqa", "winogrande", "hellaswag") else "test"
    write(tmp_path / "public" / f"{name}.jsonl", public)
    write(tmp_path / "official" / name / f"{split}.jsonl", official)
    rows = [
        read_prompt(manager, name, tmp_path / kind) for kind in ("public", "official")
    ]
    if (
        name == "hellaswag"
    ):  # the official prompt capitalizes ctx_b, llm-foundry does not
        assert rows[1][0] == "Egg: A man boils. He"
        rows[1] = rows[0][0], *rows[1][1:]
    assert rows[0] == rows[1]
    assert rows[0][0] != ""


def test_ai2_rows_and_parquet_shards(manager, tmp_path):
    import pyarrow
    import pyarrow.parquet

    write(tmp_path / "ARC-Challenge-Test.jsonl", {"question": STEM, "answerKey": "A"})
    assert read_prompt(manager, "arc_challenge", tmp_path)[1:] == (["red"], 0)
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for number in range(2):
        rows = [{"question": f"q{number}", "answer": f"#### {number}"}]
        path = folder / f"test-0000{number}-of-00002.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = load_tasks(["gsm8k"], data=tmp_path, shots=0, manager=manager)["gsm8k"]
    assert [row["question"] for row in loaded["tasks"]["gsm8k"].eval_docs] == [
        "q0",
        "q1",
    ]
    with pytest.raises(
        MaxlmError, match=r"looked for gsm8k_train and gsm8k/train \(.jsonl"
    ):
        load_tasks(
            ["gsm8k"], data=tmp_path, manager=manager
        )  # five examples by default


def test_examples_come_from_where_the_harness_takes_them(manager, tmp_path):
    problem = {"problem": "Is it?", "solution": "It is $\\boxed{2}$."}
    write(
        tmp_path / "algebra" / "test.jsonl", problem
    )  # the definition has its own examples
    task = load_tasks(["minerva_math_algebra"], data=tmp_path, manager=manager)
    task = task["minerva_math_algebra"]["tasks"]["minerva_math_algebra"]
    assert task.fewshot_context(task.eval_docs[0], 4).count("Problem:") == 5
    validation = _find_fewshot_split({"validation_split": "val", "test_split": "test"})
    assert validation == "val"


def test_tasks_that_run_programs_outside_the_sandbox_are_refused(manager, monkeypatch):
    for name, unsafe in (("cruxeval_output", False), ("pseudo_to_code_2k", True)):
        config = SimpleNamespace(task=name)
        attributes = {
            "config": config,
            "UNSAFE_CODE": unsafe,
            "get_config": lambda key: 2,
        }
        loaded = {"tasks": {name: SimpleNamespace(**attributes)}}
        monkeypatch.setattr(manager, "load", lambda _, loaded=loaded: loaded)
        monkeypatch.setattr("maxlm.evaluation.tasks.check_task_names", lambda *_: None)
        with pytest.raises(
            MaxlmError, match=f"task {name}: it would run generated programs"
        ):
            load_tasks([name], manager=manager)


def test_each_evaluation_has_the_same_examples(manager, tmp_path):
    rows = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(30)]
    write(tmp_path / "gsm8k_train.jsonl", *rows)
    write(tmp_path / "gsm8k_test.jsonl", {"question": "q?", "answer": "#### 7"})
    tasks = load_tasks(["gsm8k"], data=tmp_path, manager=manager)
    seen = []

    def answer(self, requests):
        seen.append([request.args[0] for request in requests])
        return ["7"] * len(requests)

    model: Any = type("Recorder", (DummyLM,), {"generate_until": answer})
    for _ in range(2):
        evaluate_tasks(model(), tasks)
    assert seen[0] == seen[1]


def test_mmlu_of_the_subjects_that_are_there(manager, tmp_path):
    for subject in ("anatomy", "virology"):
        for split, letter in (("dev", "D"), ("test", "B")):
            lines = [
                f'"{split} {n}, {subject}?",w,x,"y, z",v,{letter}\n' for n in range(5)
            ]
            (tmp_path / f"{subject}_{split}.csv").write_text("".join(lines))
    loaded = load_tasks(["mmlu"], data=tmp_path, shots=2, manager=manager)["mmlu"]
    assert list(loaded["tasks"]) == ["mmlu_anatomy", "mmlu_virology"]
    assert len(loaded["missing"]) == 55
    task = loaded["tasks"]["mmlu_anatomy"]
    prompt = task.fewshot_context(task.eval_docs[3], 2)

    def question(text):
        return f"{text}, anatomy?\nA. w\nB. x\nC. y, z\nD. v\nAnswer:"

    assert prompt == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        f"{question('dev 0')} D\n\n{question('dev 1')} D\n\n{question('test 3')}"
    )
    assert task.doc_to_target(task.eval_docs[3]) == 1


OFFICIAL = {
    "truthfulqa_mc2": {
        "question": "Is it?",
        "mc1_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
    },
    "gpqa_main_zeroshot": {
        "Question": "Is it?",
        "Correct Answer": "yes",
        **{f"Incorrect Answer {n}": f"no {n}" for n in (1, 2, 3)},
    },
    "mmlu_pro_law": {
        "question": "Is it?",
        "options": ["no", "yes"],
        "answer": "B",
        "category": "law",
        "cot_content": "A: Let's think step by step. The answer is (B).",
    },
    "minerva_math_algebra": {"problem": "Is it?", "solution": "It is $\\boxed{2}$."},
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_rows(name, manager, tmp_path):
    write(tmp_path / f"{name}.jsonl", OFFICIAL[name])
    loaded = load_tasks([name], data=tmp_path, shots=0, manager=manager)[name]
    task = loaded["tasks"][name]
    assert "Is it?" in task.doc_to_text(task.eval_docs[0])


def test_mistakes(manager, tmp_path):
    with pytest.raises(MaxlmError, match="no task 'helaswag'; did you mean hellaswag"):
        check_task_names(manager, ["piqa", "helaswag"])
    with pytest.raises(
        MaxlmError, match="looked for piqa_validation and piqa/validation"
    ):
        load_tasks(["piqa"], data=tmp_path, manager=manager)
    write(
        tmp_path / "piqa.jsonl", {"query": "no choices", "choices": [], "gold": "one"}
    )
    with pytest.raises(
        MaxlmError, match=r"piqa.jsonl: these rows have no known form \(ValueError"
    ):
        load_tasks(["piqa"], data=tmp_path, manager=manager)
