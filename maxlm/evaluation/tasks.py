"""Tasks of lm-evaluation-harness by name, with rows of its own loaders or of local
files.

Files are found by their names: a task's (``hellaswag_validation.jsonl``,
``hellaswag/validation.jsonl``, or ``hellaswag.jsonl`` for the split that is evaluated),
or those of its dataset on the Hugging Face hub
(``ai2_arc/ARC-Easy/test-00000-of-00001.parquet``). Rows are the dataset's own, or in
one of the forms of ``_convert_row``.
"""

import csv
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Entry, Kind

from maxlm.config import MaxlmError
from maxlm.evaluation.code import replace_code_eval
from maxlm.runtime.json_files import parse_json, read_json_file
from maxlm.runtime.json_types import JsonMapping, JsonObject

if TYPE_CHECKING:
    from datasets import Dataset

Row = JsonObject
_SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")
_COPY_AGAIN = "copy the benchmark's file again"
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_CODE_TASKS = ("humaneval", "mbpp")


class MissingData(MaxlmError):
    """A task has no local files."""


class LocalTaskFactory(TaskFactory):
    """Builds the harness's tasks as its definitions say, with rows of a folder's files.

    Args:
        shots: examples before each question; None: as a task says.

    Attributes:
        missing: tasks of groups that the folder has no files of; they are left out.
    """

    def __init__(self, folder: Path, shots: int | None):
        super().__init__()
        self._folder = folder
        self._shots = shots
        self.missing: list[str] = []

    def _build_task(self, entry: Entry, overrides: JsonObject | None) -> Task:
        config = self._load_full_config(entry, overrides)
        if "dataset_path" not in config:
            raise MissingData("this task takes no local files", where=entry.name)
        task_shots = config.get("num_fewshot")
        shots = self._shots
        if task_shots == 0 or shots is None:
            shots = task_shots  # a task that says 0 shows its questions alone
        evaluated_split = config.get("test_split") or config.get("validation_split")
        fewshot_split = _find_fewshot_split(config) if shots else None
        rows: JsonObject = {}
        for split in (evaluated_split, fewshot_split):
            if split and split not in rows:
                is_evaluated = split == evaluated_split
                rows[split] = load_split(
                    self._folder, config, split, is_evaluated=is_evaluated
                )
        changes: JsonObject = {
            "dataset_kwargs": None,
            "custom_dataset": lambda **_: rows,
        }
        # A split without rows must not be loaded.
        for name in _SPLITS:
            split = config.get(name)
            changes[name] = split if split in rows else None
        return super()._build_task(entry, {**(overrides or {}), **changes})

    def _build_tag(
        self,
        entry: Entry,
        overrides: JsonObject | None,
        registry: Mapping[str, Entry],
    ) -> list[Task]:
        entries = cast(dict[str, Entry], registry)
        members = self._build_group_members(
            [entry.name], entry.name, overrides, entries
        )
        return cast(list[Task], members)  # a tag has no groups

    def _build_group_members(
        self,
        member_list: Sequence[str | JsonObject],
        group_name: str,
        overrides: JsonObject | None,
        registry: dict[str, Entry],
    ) -> list[Task | Group]:
        # A tag is replaced by its tasks, so that one without files is left out alone.
        members: list[str | JsonObject] = []
        for member in member_list:
            entry = registry.get(member) if isinstance(member, str) else None
            if entry and entry.kind is Kind.TAG:
                members += sorted(entry.tags)
            else:
                members.append(member)
        tasks: list[Task | Group] = []
        error = None
        for member in members:
            try:
                tasks += super()._build_group_members(
                    [member], group_name, overrides, registry
                )
            except MissingData as missing:
                error = missing
                # Those of a group within this one are in the list already.
                if isinstance(member, str) and registry[member].kind is not Kind.GROUP:
                    self.missing.append(member)
        if error and not tasks:
            raise error
        return tasks


def _find_fewshot_split(config: JsonMapping) -> str | None:
    """Returns the split of the examples, as the harness chooses it; None: the evaluated
    one, or examples that the definition has itself."""
    if config.get("fewshot_split"):
        return config["fewshot_split"]
    fewshot_config = config.get("fewshot_config") or {}
    if fewshot_config.get("samples"):
        return None
    return config.get("training_split") or config.get("validation_split")


def check_task_names(manager: TaskManager, names: Sequence[str]) -> None:
    """Raises MaxlmError, with near names, if the harness has no task, group or tag of a
    name."""
    all_names = manager.all_tasks
    for name in names:
        if name in all_names:
            continue
        near_names = get_close_matches(name, all_names, n=3)
        longer_names = [other for other in all_names if other.startswith(name)]
        near_names += longer_names[:3]
        fix = "see lm_eval ls tasks"
        if near_names:
            fix = f"did you mean {' or '.join(dict.fromkeys(near_names))}?"
        raise MaxlmError(f"no task {name!r}", where="--tasks", fix=fix)


_index_tasks = cache(TaskManager)
"""Once a process: it reads 13,000 files, which takes ten seconds."""


def load_tasks(
    names: Sequence[str],
    *,
    data: Path | None = None,
    shots: int | None = None,
    seed: int | None = None,
    manager: TaskManager | None = None,
) -> JsonObject:
    """Loads tasks, groups of tasks, or all that have a tag. Raises MaxlmError: an
    unknown task, rows that cannot be loaded, or a task that would run generated
    programs outside the sandbox.

    Args:
        data: a folder with files of rows; None: the harness loads them from the Hugging
            Face hub.
        shots: examples before each question; None: as the task says.
        seed: of what tasks draw; None: the harness's own, 0 and 1234.

    Returns:
        By name, what the harness's ``evaluate`` takes; its ``missing`` are tasks of a
        group that ``data`` has no files of, its ``seed`` that of the examples.
    """
    manager = manager or _index_tasks()
    loaded_by_name: JsonObject = {}
    check_task_names(manager, names)
    for name in names:
        # Tasks draw from the global generators; the defaults are the harness's.
        random.seed(0 if seed is None else seed)
        example_seed = 1234 if seed is None else seed
        np.random.seed(example_seed)
        factory = TaskFactory() if data is None else LocalTaskFactory(data, shots)
        manager._factory = factory
        runs_code = any(code_task in name for code_task in _CODE_TASKS)
        sandbox = replace_code_eval() if runs_code else nullcontext()
        try:
            with sandbox:
                loaded: JsonObject = {**manager.load(name)}
        except MaxlmError:
            raise
        except Exception as error:
            # Definitions run code of their own, and download: anything may be raised.
            message = f"cannot be loaded ({type(error).__name__}: {error})"
            fix = None if data else "without internet, name local files: --data FOLDER"
            raise MaxlmError(message, where=f"task {name}", fix=fix) from error
        for task in loaded["tasks"].values():
            task_shots = task.get_config("num_fewshot")
            if task_shots is None or (task_shots and shots is not None):
                task.set_config(key="num_fewshot", value=shots or 0)
            _check_runs_no_code(task, runs_in_sandbox=runs_code)
        missing = factory.missing if isinstance(factory, LocalTaskFactory) else []
        loaded_by_name[name] = {**loaded, "missing": missing, "seed": example_seed}
    return loaded_by_name


def _check_runs_no_code(task: Task, *, runs_in_sandbox: bool) -> None:
    """Raises MaxlmError for a task that runs generated programs, but in the sandbox."""
    name = str(task.config.task)
    # cruxeval's tasks run code without saying so.
    runs_code = getattr(task, "UNSAFE_CODE", False) or "cruxeval" in name
    if runs_code and not runs_in_sandbox:
        message = "it would run generated programs outside the sandbox"
        raise MaxlmError(message, where=f"task {name}", fix="leave it out")


def evaluate_tasks(
    model: LM,
    tasks: JsonMapping,
    *,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    on_task: Callable[[str], None] | None = None,
) -> JsonObject:
    """Evaluates a model on tasks (:func:`load_tasks`), one after the other.

    Args:
        limit: rows of each task at most; None: all.
        chat: write prompts as conversations, by the model's chat template.
        system: text of the system's message.
        on_task: called with each name before it is evaluated.

    Returns:
        The harness's dict of results, ``samples`` among them; ``missing``;
        ``seconds_by_task``.
    """
    # Of standard errors: a fork may deadlock beside JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    merged: JsonObject = {"seconds_by_task": {}, "missing": []}
    for name, loaded in tasks.items():
        start = time.perf_counter()
        if on_task is not None:
            on_task(name)
        for task in loaded["tasks"].values():  # each time: the same examples
            task.set_fewshot_seed(seed=loaded["seed"])
        results = evaluate(
            model,
            loaded,
            limit=limit,
            system_instruction=system,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            bootstrap_iters=1000,
            confirm_run_unsafe_code=True,  # in the sandbox: load_tasks refuses others
        )
        assert results is not None  # None: the harness's own ranks above 0
        for key, value in results.items():
            if isinstance(value, dict):
                value = {**merged.get(key, {}), **value}
            merged[key] = value
        merged["missing"] += loaded["missing"]
        merged["seconds_by_task"][name] = time.perf_counter() - start
    return merged


def load_split(
    folder: Path, config: JsonMapping, split: str, *, is_evaluated: bool
) -> "Dataset":
    """Loads a split of a task. Raises MissingData: no file; MaxlmError: a file whose
    rows have no known form.

    Args:
        config: the task's definition (``task``, ``dataset_path``, ``dataset_name``).
        is_evaluated: whether a file that names no split holds this one.
    """
    from datasets import Dataset

    dataset = config["dataset_path"].rpartition("/")[2]
    rows = []
    for path in _find_files(folder, config, split, is_evaluated=is_evaluated):
        try:
            rows += [_convert_row(row, dataset) for row in _read_rows(path)]
        except (ValueError, LookupError, TypeError) as error:
            # Rows of others' files have any shape; _convert_row knows the usual ones.
            message = f"these rows have no known form ({type(error).__name__}: {error})"
            fix = "see docs/evaluation.md"
            raise MaxlmError(message, where=str(path), fix=fix) from error
    if not rows:
        name = config["dataset_name"] if dataset == "mmlu" else config["task"]
        message = (
            f"no rows of {config['task']}: looked for {name}_{split} and "
            f"{name}/{split} ({', '.join(_SUFFIXES)}), and for the files of "
            f"{config['dataset_path']}"
        )
        raise MissingData(message, where=str(folder), fix="put a file there")
    return Dataset.from_list(rows)


def _find_files(
    folder: Path, config: JsonMapping, split: str, *, is_evaluated: bool
) -> list[Path]:
    """Finds the files of a split: one, or the numbered parts of one folder; none, where
    nothing matches."""
    dataset = config["dataset_path"].rpartition("/")[2]
    subset = str(config.get("dataset_name") or "main")
    has_one_subset = subset in ("main", "default", "all")
    names = [config["task"], dataset + subset, dataset if has_one_subset else subset]
    name_patterns = []
    for name in names:
        letters = _squash(name).replace("/", "")
        # A name may be split over folders.
        name_patterns.append("(?:^|/)" + "/?".join(letters))
    if split == "validation":
        split = "(?:validation|valid|val|dev)"
    # The best match first: a name with its split, then a name alone.
    patterns = [
        f"{name}/?(?:data/)?{split}[0-9]*(?:of[0-9]+)?$" for name in name_patterns
    ]
    if is_evaluated:
        patterns += [f"{name}$" for name in name_patterns]
    squashed: dict[Path, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SUFFIXES:
            squashed[path] = _squash(str(path.relative_to(folder).with_suffix("")))
    for pattern in patterns:
        matches = [path for path, name in squashed.items() if re.search(pattern, name)]
        if not matches:
            continue
        first = matches[0]
        if "-of-" not in first.name:
            return [first]
        return [
            path
            for path in matches
            if "-of-" in path.name and path.parent == first.parent
        ]
    return []


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", text.lower())


def _read_rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
        # Hendrycks et al.'s files of MMLU have no head.
        is_mmlu = len(lines[0]) == 6 and lines[0][5] in ("A", "B", "C", "D")
        head = ["question", *"ABCD", "answer"] if is_mmlu else lines.pop(0)
        for line in lines:
            yield dict(zip(head, line, strict=True))
    elif path.suffix == ".json":
        yield from read_json_file(path, _COPY_AGAIN)
    else:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if line.strip():
                yield parse_json(line, f"{path}:{number}", _COPY_AGAIN)


def _convert_row(row: Row, dataset: str) -> Row:
    """Returns a row in its dataset's own form."""
    if {"question", "A", "D", "answer"} <= row.keys():  # Hendrycks et al.'s MMLU
        return {
            "question": row["question"],
            "choices": [row[letter] for letter in "ABCD"],
            "answer": "ABCD".index(row["answer"]),
        }
    if {"query", "choices", "gold"} <= row.keys():  # llm-foundry's multiple choice
        return _convert_multiple_choice(row, dataset)
    if {"context_options", "continuation", "gold"} <= row.keys():
        return _convert_winogrande(row)
    if {"context", "continuation"} <= row.keys():  # llm-foundry's LAMBADA
        return {"text": f"{row['context']} {row['continuation']}"}
    if isinstance(row.get("question"), Mapping):  # AI2's ARC and OpenBookQA
        stem = row["question"]["stem"]
        choices = row["question"]["choices"]
        columns = {
            "text": [choice["text"] for choice in choices],
            "label": [choice["label"] for choice in choices],
        }
        return {**row, "question": stem, "question_stem": stem, "choices": columns}
    return row


def _convert_winogrande(row: Row) -> Row:
    """Returns llm-foundry's row of WinoGrande, two contexts, as a sentence with a gap
    and its two fillings."""
    first, second = row["context_options"]
    # The contexts are one text up to the word that fills the gap.
    num_equal = 0
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            num_equal = place
            break
    start = first.rfind(" ", 0, num_equal) + 1
    return {
        "sentence": f"{first[:start]}_ {row['continuation'].strip()}",
        "option1": first[start:],
        "option2": second[start:],
        "answer": str(row["gold"] + 1),
    }


def _convert_multiple_choice(row: Row, dataset: str) -> Row:
    query = row["query"]
    choices = row["choices"]
    gold = int(row["gold"])
    text = query.removeprefix("Question: ").rstrip("\n")
    if dataset == "piqa":
        return {"goal": text, "sol1": choices[0], "sol2": choices[1], "label": gold}
    if dataset == "hellaswag":
        activity, _, context = query.partition(": ")
        return {
            "activity_label": activity,
            "ctx_a": context,
            "ctx_b": "",
            "endings": choices,
            "label": str(gold),
        }
    labels = [chr(ord("A") + number) for number in range(len(choices))]
    question_field = "question_stem" if dataset == "openbookqa" else "question"
    return {
        question_field: text,
        "choices": {"text": choices, "label": labels},
        "answerKey": labels[gold],
    }
