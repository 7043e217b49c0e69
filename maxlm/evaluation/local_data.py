"""Rows of public benchmark files, as the harness's own task definitions read them.

Files are found by their names: a task's (``hellaswag_validation.jsonl``,
``hellaswag/validation.jsonl``, or ``hellaswag.jsonl`` for the split that is evaluated), or those of
its dataset on the Hugging Face hub (``ai2_arc/ARC-Easy/test-00000-of-00001.parquet``). Rows are the
dataset's own, or in one of the forms of ``_convert_row``.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")


class MissingData(MaxlmError):
    """A task has no local files."""


def load_split(folder: Path, config: Mapping[str, Any], split: str, *, is_evaluated: bool) -> Any:
    """Loads a split of a task as a ``datasets.Dataset``.

    Args:
        config: the task's definition (``task``, ``dataset_path``, ``dataset_name``).
        is_evaluated: whether a file that names no split holds this one.

    Raises:
        MissingData: no file.
        MaxlmError: a file whose rows have no known form.
    """
    from datasets import Dataset

    dataset, rows = config["dataset_path"].rpartition("/")[2], []
    for path in _find_files(folder, config, split, is_evaluated=is_evaluated):
        try:
            rows += [_convert_row(row, dataset) for row in _read_rows(path)]
        except (ValueError, LookupError, TypeError) as error:
            what = f"these rows have no known form ({type(error).__name__}: {error})"
            raise MaxlmError(what, where=str(path), fix="see docs/evaluation.md") from error
    if not rows:
        name = config["dataset_name"] if dataset == "mmlu" else config["task"]
        what = f"no rows of {config['task']}: looked for {name}_{split} and {name}/{split} "
        what += f"({', '.join(_SUFFIXES)}), and for the files of {config['dataset_path']}"
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
    squashed = {path: _squash(str(path.relative_to(folder).with_suffix(""))) for path in files}
    for pattern in patterns:
        if found := [path for path in files if re.search(pattern, squashed[path])]:
            shards = [p for p in found if "-of-" in p.name and p.parent == found[0].parent]
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
        yield from json.loads(path.read_text("utf-8"))
    else:
        yield from map(json.loads, filter(str.strip, path.read_text("utf-8").split("\n")))


def _convert_row(row: Row, dataset: str) -> Row:
    """Returns a row in its dataset's own form."""
    if {"question", "A", "D", "answer"} <= row.keys():  # Hendrycks et al.'s MMLU
        answer = "ABCD".index(row["answer"])
        return {"question": row["question"], "choices": [row[c] for c in "ABCD"], "answer": answer}
    if {"query", "choices", "gold"} <= row.keys():  # llm-foundry's multiple choice
        return _convert_multiple_choice(row, dataset)
    if {"context_options", "continuation", "gold"} <= row.keys():  # llm-foundry's WinoGrande
        one, two = row["context_options"]
        same = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
        start = one.rfind(" ", 0, same) + 1
        sentence, answer = f"{one[:start]}_ {row['continuation'].strip()}", str(row["gold"] + 1)
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
    query, choices, gold = row["query"], row["choices"], int(row["gold"])
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
