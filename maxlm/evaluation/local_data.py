"""Rows of public benchmark files, as the harness's own task definitions read them.

A folder is searched for files by their names: of a task (``hellaswag_validation.jsonl``,
``hellaswag/validation.jsonl``, or ``hellaswag.jsonl`` for the split that is evaluated), or of its
dataset on the Hugging Face hub (``ai2_arc/ARC-Easy/test-00000-of-00001.parquet``). Rows are the
dataset's own, or have one of the forms below.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from os.path import commonprefix
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError

Row = dict[str, Any]
_SUFFIXES = (".jsonl", ".parquet", ".csv", ".json")


def load_split(folder: Path, config: Mapping[str, Any], split: str, *, is_evaluated: bool) -> Any:
    """Loads a split of a task as a ``datasets.Dataset``; None: there is no file.

    Args:
        config: the task's definition (``task``, ``dataset_path``, ``dataset_name``).
        is_evaluated: whether a file that names no split holds this one.

    Raises:
        MaxlmError: a file that cannot be read, or whose rows have another form.
    """
    from datasets import Dataset

    files = [p for p in sorted(folder.rglob("*")) if p.suffix in _SUFFIXES]
    names = [_squash(str(p.relative_to(folder).with_suffix(""))) for p in files]
    rows = []
    for path in _find_files(files, names, _list_patterns(config, split, is_evaluated=is_evaluated)):
        try:
            rows += [_convert_row(row) for row in _read_rows(path)]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            what = f"these rows have no known form ({type(error).__name__}: {error})"
            raise MaxlmError(what, where=str(path), fix="see docs/evaluation.md") from error
    return Dataset.from_list(rows) if rows else None


def _find_files(files: list[Path], names: list[str], patterns: Iterable[str]) -> list[Path]:
    """The first file whose name is of the earliest pattern possible, with its other shards."""
    for pattern in patterns:
        found = [path for path, name in zip(files, names, strict=True) if re.search(pattern, name)]
        if found:
            shards = [p for p in found if "-of-" in p.name and p.parent == found[0].parent]
            return shards if "-of-" in found[0].name else found[:1]
    return []


def describe_missing(folder: Path, config: Mapping[str, Any], split: str) -> MaxlmError:
    """Returns the error that a split has no file."""
    name = config.get("dataset_name") if "/mmlu" in config["dataset_path"] else config["task"]
    what = f"no rows of {config['task']}: looked for {name}_{split} or {name}/{split} "
    what += f"({', '.join(_SUFFIXES)}), and for the files of {config['dataset_path']}"
    return MaxlmError(what, where=str(folder), fix="put a file there, or name another folder")


def _list_patterns(config: Mapping[str, Any], split: str, *, is_evaluated: bool) -> list[str]:
    """Returns expressions for the end of a path of letters, digits and slashes alone."""
    dataset = str(config["dataset_path"]).rpartition("/")[2]
    subset = str(config.get("dataset_name") or "main")
    names = [str(config["task"]), dataset + subset]
    names.append(dataset if subset in ("main", "default", "all") else subset)
    # A name may be split over folders.
    spread = ["(?:^|/)" + "/?".join(_squash(name).replace("/", "")) for name in names]
    split = "(?:validation|valid|val|dev)" if split == "validation" else split
    patterns = [f"{name}/?(?:data/)?{split}[0-9]*(?:of[0-9]+)?$" for name in spread]
    return [*patterns, *(f"{name}$" for name in spread if is_evaluated)]


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", text.lower())


def _read_rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
        is_mmlu = len(lines[0]) == 6 and lines[0][5].strip() in [*"ABCD"]
        heads = ["question", "A", "B", "C", "D", "answer"] if is_mmlu else lines.pop(0)
        yield from (dict(zip(heads, line, strict=True)) for line in lines)
    elif path.suffix == ".json":
        yield from json.loads(path.read_text("utf-8"))
    else:
        yield from map(json.loads, filter(str.strip, path.open(encoding="utf-8")))


def _convert_row(row: Row) -> Row:
    """Returns a row of another form in the dataset's own."""
    return next((make(row) for keys, make in _FORMS if keys <= row.keys()), row)


def _convert_mmlu(row: Row) -> Row:
    """Hendrycks et al.'s CSV: question, four choices, letter."""
    choices = [row[letter] for letter in "ABCD"]
    return {"question": row["question"], "choices": choices, "answer": "ABCD".index(row["answer"])}


def _convert_multiple_choice(row: Row) -> Row:
    """llm-foundry's query, choices, gold: of ARC, OpenBookQA, PIQA or HellaSwag."""
    query, choices, gold = row["query"], row["choices"], int(row["gold"])
    is_question = query.startswith("Question: ")
    text = query.removeprefix("Question: ").rstrip("\n") if is_question else query
    if len(choices) == 2:
        return {"goal": text, "sol1": choices[0], "sol2": choices[1], "label": gold}
    label, _, rest = query.partition(": ")
    labels = [chr(ord("A") + n) for n in range(len(choices))]
    found = {"choices": {"text": choices, "label": labels}, "answerKey": labels[gold]}
    hellaswag = {"activity_label": label, "ctx_a": rest, "ctx_b": "", "endings": choices}
    return found | {"question": text, "question_stem": text, **hellaswag, "label": str(gold)}


def _convert_schema(row: Row) -> Row:
    """llm-foundry's context_options, continuation, gold: of WinoGrande."""
    first, second = row["context_options"]
    start = commonprefix([first, second]).rfind(" ") + 1
    sentence = f"{first[:start]}_ {row['continuation'].strip()}"
    options = {"option1": first[start:], "option2": second[start:]}
    return {"sentence": sentence, **options, "answer": str(int(row["gold"]) + 1)}


def _convert_last_word(row: Row) -> Row:
    """llm-foundry's context, continuation: of LAMBADA."""
    return {"text": f"{row['context']} {row['continuation']}"}


def _convert_stem(row: Row) -> Row:
    """AI2's own files of ARC and OpenBookQA: question is {stem, choices: [{text, label}]}."""
    if not isinstance(row["question"], Mapping):
        return row
    stem, choices = row["question"]["stem"], row["question"]["choices"]
    columns = {name: [each[name] for each in choices] for name in ("text", "label")}
    return {**row, "question": stem, "question_stem": stem, "choices": columns}


_FORMS: list[tuple[set[str], Callable[[Row], Row]]] = [
    ({"question", "A", "B", "C", "D", "answer"}, _convert_mmlu),
    ({"query", "choices", "gold"}, _convert_multiple_choice),
    ({"context_options", "continuation", "gold"}, _convert_schema),
    ({"context", "continuation"}, _convert_last_word),
    ({"question", "answerKey"}, _convert_stem),
]
"""The columns that tell a form, and what converts it."""
