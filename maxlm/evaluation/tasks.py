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
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._factory import TaskFactory
from lm_eval.tasks._index import Kind

from maxlm.config import MaxlmError
from maxlm.evaluation.code import replace_code_eval
from maxlm.runtime.json_files import parse_json, read_json_file

Row = dict[str, Any]
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
        self._folder, self._shots = folder, shots
        self.missing: list[str] = []

    def _build_task(self, entry: Any, overrides: dict[str, Any] | None) -> Any:
        config = self._load_full_config(entry, overrides)
        if "dataset_path" not in config:
            raise MissingData("this task takes no local files", where=entry.name)
        own = config.get("num_fewshot")
        shots = own if own == 0 or self._shots is None else self._shots
        evaluated = config.get("test_split") or config.get("validation_split")
        examples = _find_fewshot_split(config) if shots else None
        rows = {
            split: load_split(
                self._folder, config, split, is_evaluated=split == evaluated
            )
            for split in dict.fromkeys(filter(None, (evaluated, examples)))
        }
        changes = {
            name: config.get(name) if config.get(name) in rows else None
            for name in _SPLITS
        }
        changes |= {"dataset_kwargs": None, "custom_dataset": lambda **_: rows}
        return super()._build_task(entry, (overrides or {}) | changes)

    def _build_tag(self, entry: Any, overrides: Any, registry: Any) -> list[Any]:
        return self._build_group_members([entry.name], entry.name, overrides, registry)

    def _build_group_members(
        self, member_list: Any, group_name: str, overrides: Any, registry: Any
    ) -> list[Any]:
        names = []
        built = []
        error = None
        for item in member_list:
            entry = registry.get(item) if isinstance(item, str) else None
            names += sorted(entry.tags) if entry and entry.kind is Kind.TAG else [item]
        for name in names:
            try:
                built += super()._build_group_members(
                    [name], group_name, overrides, registry
                )
            except MissingData as missing:
                error = missing
                if isinstance(name, str) and registry[name].kind is not Kind.GROUP:
                    self.missing.append(name)
        if error and not built:
            raise error
        return built


def _find_fewshot_split(config: Mapping[str, Any]) -> str | None:
    """Returns the split of the examples, as the harness chooses it; None: the evaluated
    one, or examples that the definition has itself."""
    if split := config.get("fewshot_split"):
        return split
    if (config.get("fewshot_config") or {}).get("samples"):
        return None
    return config.get("training_split") or config.get("validation_split")


def check_task_names(manager: TaskManager, names: Sequence[str]) -> None:
    """Raises MaxlmError, with near names, if the harness has no task, group or tag of a
    name."""
    known = manager.all_tasks
    for name in (each for each in names if each not in known):
        near = (
            get_close_matches(name, known, n=3)
            + [k for k in known if k.startswith(name)][:3]
        )
        fix = (
            f"did you mean {' or '.join(dict.fromkeys(near))}?"
            if near
            else "see lm_eval ls tasks"
        )
        raise MaxlmError(f"no task {name!r}", where="--tasks", fix=fix)


# Once a process: it reads 13,000 files, which takes ten seconds.
_index_tasks = cache(TaskManager)


def load_tasks(
    names: Sequence[str],
    *,
    data: Path | None = None,
    shots: int | None = None,
    seed: int | None = None,
    manager: TaskManager | None = None,
) -> dict[str, Any]:
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
    opened = {}
    check_task_names(manager, names)
    for name in names:
        random.seed(0 if seed is None else seed)
        np.random.seed(1234 if seed is None else seed)
        manager._factory = (
            TaskFactory() if data is None else LocalTaskFactory(data, shots)
        )
        try:
            runs_code = any(kind in name for kind in _CODE_TASKS)
            with replace_code_eval() if runs_code else nullcontext():
                loaded: Any = manager.load(name)
        except MaxlmError:
            raise
        except Exception as error:  # definitions run code of their own, and download
            what = f"cannot be loaded ({type(error).__name__}: {error})"
            fix = None if data else "without internet, name local files: --data FOLDER"
            raise MaxlmError(what, where=f"task {name}", fix=fix) from error
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (own and shots is not None):
                task.set_config(key="num_fewshot", value=shots or 0)
            unsafe = (
                getattr(task, "UNSAFE_CODE", False) or "cruxeval" in task.config.task
            )
            if unsafe and not runs_code:
                what = "it would run generated programs outside the sandbox"
                raise MaxlmError(
                    what, where=f"task {task.config.task}", fix="leave it out"
                )
        missing = getattr(manager._factory, "missing", [])
        opened[name] = loaded | {
            "missing": missing,
            "seed": 1234 if seed is None else seed,
        }
    return opened


def evaluate_tasks(
    model: LM,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    chat: bool = False,
    system: str | None = None,
    on_task: Callable[[str], None] | None = None,
) -> dict[str, Any]:
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
    os.environ["DISABLE_MULTIPROC"] = (
        "1"  # standard errors: a fork may deadlock beside JAX
    )
    prompts = {"system_instruction": system, "apply_chat_template": chat}
    merged: dict[str, Any] = {"seconds_by_task": {}, "missing": []}
    for name, loaded in tasks.items():
        start = time.perf_counter()
        if on_task is not None:
            on_task(name)
        for task in loaded["tasks"].values():  # each time: the same examples
            task.set_fewshot_seed(seed=loaded["seed"])
        own = {**prompts, "fewshot_as_multiturn": chat, "bootstrap_iters": 1000}
        own["confirm_run_unsafe_code"] = (
            True  # in the sandbox: load_tasks refuses others
        )
        found: Any = evaluate(model, loaded, limit=limit, **own)
        for key, value in found.items():
            merged[key] = (
                merged.get(key, {}) | value if isinstance(value, dict) else value
            )
        merged["missing"] += loaded["missing"]
        merged["seconds_by_task"][name] = time.perf_counter() - start
    return merged


def load_split(
    folder: Path, config: Mapping[str, Any], split: str, *, is_evaluated: bool
) -> Any:
    """Loads a split of a task as a ``datasets.Dataset``. Raises MissingData: no file;
    MaxlmError: a file whose rows have no known form.

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
            what = f"these rows have no known form ({type(error).__name__}: {error})"
            raise MaxlmError(
                what, where=str(path), fix="see docs/evaluation.md"
            ) from error
    if not rows:
        name = config["dataset_name"] if dataset == "mmlu" else config["task"]
        what = f"no rows of {config['task']}: looked for {name}_{split} and {name}/{split} "
        what += (
            f"({', '.join(_SUFFIXES)}), and for the files of {config['dataset_path']}"
        )
        raise MissingData(what, where=str(folder), fix="put a file there")
    return Dataset.from_list(rows)


def _find_files(
    folder: Path, config: Mapping[str, Any], split: str, *, is_evaluated: bool
) -> list[Path]:
    dataset = config["dataset_path"].rpartition("/")[2]
    subset = str(config.get("dataset_name") or "main")
    names = [config["task"], dataset + subset]
    names.append(dataset if subset in ("main", "default", "all") else subset)
    # A name may be split over folders.
    spread = ["(?:^|/)" + "/?".join(_squash(name).replace("/", "")) for name in names]
    split = "(?:validation|valid|val|dev)" if split == "validation" else split
    patterns = [f"{name}/?(?:data/)?{split}[0-9]*(?:of[0-9]+)?$" for name in spread]
    patterns += [f"{name}$" for name in spread if is_evaluated]
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES]
    squashed = {
        path: _squash(str(path.relative_to(folder).with_suffix(""))) for path in files
    }
    for pattern in patterns:
        if found := [path for path in files if re.search(pattern, squashed[path])]:
            shards = [
                p for p in found if "-of-" in p.name and p.parent == found[0].parent
            ]
            return shards if "-of-" in found[0].name else found[:1]
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
        is_mmlu = len(lines[0]) == 6 and lines[0][5] in (*"ABCD",)
        head = ["question", *"ABCD", "answer"] if is_mmlu else lines.pop(0)
        yield from (dict(zip(head, line, strict=True)) for line in lines)
    elif path.suffix == ".json":
        yield from read_json_file(path, _COPY_AGAIN)
    else:
        for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
            if line.strip():
                yield parse_json(line, f"{path}:{number}", _COPY_AGAIN)


def _convert_row(row: Row, dataset: str) -> Row:
    """Returns a row in its dataset's own form."""
    if {"question", "A", "D", "answer"} <= row.keys():  # Hendrycks et al.'s MMLU
        answer = "ABCD".index(row["answer"])
        return {
            "question": row["question"],
            "choices": [row[c] for c in "ABCD"],
            "answer": answer,
        }
    if {"query", "choices", "gold"} <= row.keys():  # llm-foundry's multiple choice
        return _convert_multiple_choice(row, dataset)
    if {
        "context_options",
        "continuation",
        "gold",
    } <= row.keys():  # llm-foundry's WinoGrande
        one, two = row["context_options"]
        same = next(
            (n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0
        )
        start = one.rfind(" ", 0, same) + 1
        sentence = f"{one[:start]}_ {row['continuation'].strip()}"
        answer = str(row["gold"] + 1)
        options = {"option1": one[start:], "option2": two[start:]}
        return {"sentence": sentence, **options, "answer": answer}
    if {"context", "continuation"} <= row.keys():  # llm-foundry's LAMBADA
        return {"text": f"{row['context']} {row['continuation']}"}
    if isinstance(row.get("question"), Mapping):  # AI2's ARC and OpenBookQA
        stem, choices = row["question"]["stem"], row["question"]["choices"]
        columns = {name: [each[name] for each in choices] for name in ("text", "label")}
        return {**row, "question": stem, "question_stem": stem, "choices": columns}
    return row


def _convert_multiple_choice(row: Row, dataset: str) -> Row:
    query = row["query"]
    choices = row["choices"]
    gold = int(row["gold"])
    text = query.removeprefix("Question: ").rstrip("\n")
    if dataset == "piqa":
        return {"goal": text, "sol1": choices[0], "sol2": choices[1], "label": gold}
    if dataset == "hellaswag":
        activity, _, context = query.partition(": ")
        split = {"activity_label": activity, "ctx_a": context, "ctx_b": ""}
        return {**split, "endings": choices, "label": str(gold)}
    labels = [chr(ord("A") + number) for number in range(len(choices))]
    answer = {"choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}
    return {"question_stem" if dataset == "openbookqa" else "question": text, **answer}
