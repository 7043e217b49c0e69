"""Examples of rows of files as a task reads them: what is learnt, cut and left out."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from pydantic import Field
from rich.text import Text

from maxlm.config import Config, MaxlmError
from maxlm.config.load import load_config
from maxlm.data.loader.batches import LoaderConfig
from maxlm.data.row_files import open_rows
from maxlm.data.rows import encode_row
from maxlm.data.tokenizer.chat import add_chat_template
from maxlm.data.tokenizer.codec import Tokenizer
from maxlm.data.tokenizer.config import TokenizerConfig
from maxlm.data.tokenizer.files import METADATA
from maxlm.data.tokenizer.load import import_tokenizer, load_tokenizer
from maxlm.huggingface.model_files import open_model_files
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.tasks import TASKS, TaskConfig
from maxlm.tasks.rows import RowTask, scan_examples

_STYLES = {(True, False): "bold green", (True, True): "green", (False, True): "dim"}
"""Styles of spans by (is learnt, is special)."""


class ExampleSettings(Config):
    """The settings of a run that decide what becomes of rows."""

    task: TaskConfig
    data: LoaderConfig = LoaderConfig(seq_len=2048)
    tokenizer: TokenizerConfig = TokenizerConfig()


class ColumnSettings(Config):
    """The setting that is needed before the kind of the task is known."""

    columns: Mapping[str, str] = Field(default_factory=dict)


def _is_column_setting(setting: str) -> bool:
    return setting.startswith(("task.columns=", "task.columns."))


def describe_examples(
    path: str | Path,
    model: str | Path,
    settings: Sequence[str] = (),
    *,
    kind: str | None = None,
    num_examples: int = 3,
) -> JsonObject:
    """Encodes a file of rows for a task, and describes it and its first rows as plain
    data. Raises MaxlmError: a file or tokenizer that cannot be read, a task that reads
    no rows.

    Args:
        model: folder of a run, a Hugging Face checkpoint or a tokenizer.
        settings: a run's, such as ``task.turns=last`` or ``data.seq_len=512``.
        kind: of the task; None infers it from the columns of the first row.
    """
    config = _load_settings(path, settings, kind)
    task = config.task
    assert isinstance(task, RowTask)
    tokenizer = open_tokenizer(model)
    add_chat_template(tokenizer, config.tokenizer)
    file = task.open_files("files")
    encoder = task.make_encoder(tokenizer, config.data.seq_len)
    all_rows = np.arange(len(file))
    scan = scan_examples(encoder, file, all_rows, workers=None, keep_errors=True)
    used_rows = np.flatnonzero(scan.lengths)
    lengths = scan.lengths[used_rows]
    length_quantiles = [0, 0, 0]
    if used_rows.size:
        length_quantiles = [int(np.quantile(lengths, q)) for q in (0, 0.5, 1)]
    share_learnt = float(scan.num_targets.sum() / max(1, lengths.sum()))

    sequence_names = [""]
    if task.sequences_per_example == 2:
        sequence_names = ["chosen", "rejected"]
    examples = []
    for row in used_rows[:num_examples].tolist():
        encoded = encode_row(encoder, file, row)
        for segment, name in enumerate(sequence_names, 1):
            place = f"{file.locate(row)} {name}".rstrip()
            spans = list(_list_spans(tokenizer, encoded, segment))
            examples.append({"where": place, "spans": spans})
    return {
        "kind": task.kind,
        "rows": len(file),
        "rows_used": int(used_rows.size),
        "rows_unreadable": len(scan.errors),
        "errors": [str(error) for error in scan.errors],
        "notes": task.describe_scan(scan, encoder.max_length),
        "tokens": length_quantiles,
        "share_learnt": share_learnt,
        "examples": examples,
    }


def _load_settings(
    path: str | Path, settings: Sequence[str], kind: str | None
) -> ExampleSettings:
    """Loads the settings that decide what becomes of a file's rows; raises MaxlmError
    for a kind of task that reads no rows."""
    # The kind may have to be told from the columns, under the task's names for them.
    column_settings = [
        setting.removeprefix("task.")
        for setting in settings
        if _is_column_setting(setting)
    ]
    column_names = load_config(ColumnSettings, None, column_settings).value.columns
    first_row = open_rows(path, columns=column_names)[0]
    kind = kind or infer_task_kind(first_row)
    task_class = TASKS.find(kind)
    if task_class is None or not issubclass(task_class, RowTask):
        message = f"no task on rows of files is called {kind!r}"
        fix = f"name another with --kind; the columns are {', '.join(first_row)}"
        raise MaxlmError(message, where="--kind", fix=fix)
    task_settings = (f"task.kind={kind}", f"task.files={[str(path)]}")
    return load_config(ExampleSettings, None, [*task_settings, *settings]).value


def infer_task_kind(columns: Iterable[str]) -> str:
    """Infers from the columns of rows the kind of task that they are for."""
    names = {*columns}
    if {"chosen", "rejected"} <= names:
        return "dpo"
    if {"completion", "label"} <= names:
        return "kto"
    return "sft"


def open_tokenizer(folder: str | Path) -> Tokenizer:
    """Opens the tokenizer of a run's folder, of a Hugging Face checkpoint's, of a GGUF
    file, or in its own folder."""
    folder = Path(folder)
    is_run = (folder / "config.yaml").exists()
    tokenizer_folder = folder / "tokenizer" if is_run else folder
    if (tokenizer_folder / METADATA).exists():
        return load_tokenizer(tokenizer_folder)
    with open_model_files(folder).open_tokenizer_folder() as files_folder:
        return import_tokenizer(files_folder)


def render_examples(report: JsonMapping, *, in_colour: bool) -> Text:
    """Renders what :func:`describe_examples` returns, for a rich console; without
    colour « » enclose what is learnt."""
    text = Text()
    for example in report["examples"]:
        text.append(f"{example['where']}\n", "bold underline")
        for is_learnt, group in groupby(example["spans"], lambda span: span["learnt"]):
            is_marked = is_learnt and not in_colour
            text.append("«" if is_marked else "")
            for span in group:
                style = _STYLES.get((is_learnt, span["special"]), "")
                text.append(span["text"], style)
            text.append("»" if is_marked else "")
        text.append("\n\n")
    least, median, most = report["tokens"]
    lines = [
        f"task.kind={report['kind']}: {report['rows_used']:,} of {report['rows']:,} "
        "rows are used",
        *report["notes"],
        f"tokens of an example: {least:,} to {most:,}, median {median:,}",
        f"learnt: {report['share_learnt']:.1%} of them",
    ]
    if report["rows_unreadable"]:
        lines += [
            f"{report['rows_unreadable']:,} rows are refused, such as:",
            *report["errors"][:3],
        ]
    return text.append("\n".join(lines))


def _list_spans(
    tokenizer: Tokenizer, encoded: Mapping[str, np.ndarray], segment: int
) -> Iterator[JsonObject]:
    """Yields the spans of a segment's text whose tokens are alike: learnt or not,
    special or not."""
    special_ids = set(tokenizer.special_tokens.values())
    is_of_segment = encoded["segment_ids"] == segment
    # Targets are the tokens from the second on; the first is never learnt.
    first_id = int(encoded["tokens"][is_of_segment][0])
    target_ids = encoded["targets"][is_of_segment].tolist()
    is_target = encoded["weights"][is_of_segment] > 0
    ids = [first_id, *target_ids]
    learnt = [False, *is_target.tolist()]
    special = [token_id in special_ids for token_id in ids]
    stop = 0
    for (is_learnt, is_special), group in groupby(zip(learnt, special, strict=True)):
        start = stop
        stop = start + len(list(group))
        text = tokenizer.decode_bytes(ids[start:stop], continued=start > 0)
        yield {
            "text": text.decode("utf-8", "replace"),
            "learnt": is_learnt,
            "special": is_special,
        }
