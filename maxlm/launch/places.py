"""Places of a run's text and state, as its hosts see them."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any, get_args, get_type_hints

from maxlm.config import LocalPath, MaxlmError
from maxlm.data.documents.config import PYTHON_STDLIB
from maxlm.launch.options import Mount, check_url
from maxlm.run import RunConfig

# What may be a bucket's.
_URLS = ("store", "remote_folder")


def check_paths(
    run: RunConfig,
    scheduler: str,
    mounted: Sequence[Mount],
    in_container: bool,
    user_template: bool,
) -> None:
    """Checks that there is text, or rows, and a run's folder that outlives its hosts and that all
    see.

    Args:
        in_container: it runs in a container, which sees what is mounted.
        user_template: the template is the user's: it may mount folders, or say where a job begins.
    """
    named = _places(run)
    for key, place in named.items():
        if ".documents." not in key:
            check_url(place, key)
    sources, tokenizer = run.data.sources, run.tokenizer.path or run.train.start_from
    reads_text = run.task.reads_text
    if reads_text and not sources:
        fix = "name documents or a store there"
        raise MaxlmError("no text to train on", where="data.sources", fix=fix)
    if not reads_text and not any(".files." in key for key in named):
        fix = "name a .jsonl or .parquet file there"
        raise MaxlmError("no rows to train on", where="task.files", fix=fix)
    if not (tokenizer or any(source.documents for source in sources)):
        what = "a store was made with a tokenizer, and none is named"
        fix = "name the folder of the tokenizer the stores were built with"
        if not reads_text:
            what = "rows are read with a tokenizer, and none is named"
            fix = "name its folder, or a model to start from (train.start_from)"
        raise MaxlmError(what, where="tokenizer.path", fix=fix)
    if user_template or (scheduler == "slurm" and not in_container):
        return
    for key, place in named.items():
        url = "://" in place and key.endswith(_URLS)
        if not url:
            _check_place(key, place, scheduler, mounted if in_container else None)


def _places(run: RunConfig) -> dict[str, str]:
    """Setting → what it names: folders, files, globs, URLs."""
    found: dict[str, str | None] = {"folder": run.folder}
    for i, source in enumerate(run.data.sources):
        for j, each in enumerate(source.documents):
            found[f"data.sources.{i}.documents.{j}"] = None if each == PYTHON_STDLIB else each
        found[f"data.sources.{i}.store"] = source.store
        found[f"data.sources.{i}.heldout_store"] = source.heldout_store
    for name, hint in get_type_hints(type(run.task), include_extras=True).items():
        value = getattr(run.task, name) if _has_path(hint) else None
        if isinstance(value, tuple):
            found |= {f"task.{name}.{i}": each for i, each in enumerate(value)}
        else:
            found[f"task.{name}"] = value
    found["tokenizer.path"] = run.tokenizer.path
    found["train.start_from"] = run.train.start_from
    found["checkpoint.remote_folder"] = run.checkpoint.remote_folder
    return {key: place for key, place in found.items() if place}


def _has_path(hint: Any) -> bool:
    """Returns whether a field's type is, or holds, a local path."""
    return hint == LocalPath or any(map(_has_path, get_args(hint)))


def _check_place(key: str, place: str, scheduler: str, mounted: Sequence[Mount] | None) -> None:
    """Checks a place on hosts that lack this machine's files; `mounted` None: all is there."""
    if not place.startswith("/"):
        shown = "runs" if key == "folder" else place.lstrip("./~")
        what = f"{key}={place} is another one on each host"
        raise MaxlmError(what, fix=f"name one that all see: {key}=/data/{shown}")
    path = PurePosixPath(normpath(place))
    if mounted is None or any(path.is_relative_to(mount.path) for mount in mounted):
        return
    top = PurePosixPath(*path.parts[:2])
    mount = f"--mount {top if scheduler == 'slurm' else 'gs://bucket'}:{top}"
    if key == "folder":
        what = f"{key}={place} would be lost with its hosts"
        raise MaxlmError(what, fix=f"mount what is to keep it: {mount}")
    raise MaxlmError(f"{key}={place} is not in the container", fix=f"mount what holds it: {mount}")
