"""Paths that a run names, as its job's hosts see them; placeholders for those that it
does not."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from posixpath import normpath
from typing import get_args, get_type_hints

from maxlm.config import Config, LocalPath, MaxlmError
from maxlm.data.documents.config import is_installed_text
from maxlm.launch.options import JobOptions, Mount, check_url
from maxlm.launch.schedulers import JobScheduler
from maxlm.run.config import RunConfig

PLACEHOLDER = "/path/to/"
"""Start of a path that stands for one of the user's, in a job that is shown for a
recipe without data. It is nobody's folder."""
# Settings that may name a bucket.
_URLS = ("store", "remote_folder")


def make_placeholder_settings(run: RunConfig, *, sees_files: bool) -> list[str]:
    """Returns settings, as ``key=value``, in place of the data that a recipe leaves to
    its user, and of what that data is read with; none where the run names data.

    Args:
        sees_files: whether the job's hosts see the files of the machine that it is
            submitted from, or the user's own template is trusted to say where they are;
            if not, a relative folder is replaced.
    """
    if run.task.reads_text:
        if run.data.sources:
            return []
        settings = [f"data.sources=[{{store: {PLACEHOLDER}tokens}}]"]
        if not (run.tokenizer.path or run.train.start_from):
            settings.append(f"tokenizer.path={PLACEHOLDER}tokenizer")
    else:
        if _names_rows(run):
            return []
        settings = []
        files_setting = run.task.files_setting
        if files_setting is not None:
            settings.append(f"task.{files_setting}=[{PLACEHOLDER}rows.jsonl]")
        if not _names_tokenizer(run):
            settings.append(f"train.start_from={PLACEHOLDER}model")
    if not sees_files and not PurePosixPath(run.folder).is_absolute():
        settings.append(f"folder={PLACEHOLDER}runs")
    return settings


def find_placeholder_settings(run: RunConfig) -> list[str]:
    """Returns the keys of settings that hold placeholders."""
    return [
        key for key, path in list_places(run).items() if path.startswith(PLACEHOLDER)
    ]


def check_paths(
    run: RunConfig,
    scheduler: JobScheduler,
    options: JobOptions,
    mounts: Sequence[Mount],
    user_template: bool,
) -> None:
    """Checks that there is text, or rows, and a run's folder that outlives its hosts
    and that all of them see. Raises MaxlmError: one of them is missing.

    Args:
        mounts: what the job's container, if it runs in one, sees, and nothing else.
        user_template: whether the template is the user's own, which may mount folders,
            or say where a job begins.
    """
    places = list_places(run)
    for key, path in places.items():
        if ".documents." not in key:
            check_url(path, key)
    _check_data(run)
    if user_template or scheduler.sees_submitting_machine(options):
        return
    container_mounts = mounts if scheduler.runs_in_container(options) else None
    for key, path in places.items():
        is_url = "://" in path and key.endswith(_URLS)
        if not is_url and not path.startswith(PLACEHOLDER):
            _check_path(key, path, scheduler, container_mounts)


def list_places(run: RunConfig) -> dict[str, str]:
    """Lists what a run's settings name, by their keys: folders, files, globs, URLs."""
    places: dict[str, str | None] = {"folder": run.folder}
    for number, source in enumerate(run.data.sources):
        key = f"data.sources.{number}"
        for index, documents in enumerate(source.documents):
            if not is_installed_text(documents):
                places[f"{key}.documents.{index}"] = documents
        places[f"{key}.store"] = source.store
        places[f"{key}.heldout_store"] = source.heldout_store
    places |= _list_config_places("task", run.task)
    places["tokenizer.path"] = run.tokenizer.path
    places["train.start_from"] = run.train.start_from
    places["checkpoint.remote_folder"] = run.checkpoint.remote_folder
    return {key: path for key, path in places.items() if path}


def _list_config_places(key: str, config: Config) -> dict[str, str | None]:
    """Lists the paths of a config and of those within it. It may come from outside: its
    paths are the fields of that type."""
    places: dict[str, str | None] = {}
    hints = get_type_hints(type(config), include_extras=True)
    for name in type(config).model_fields:
        field_value = getattr(config, name)
        if isinstance(field_value, tuple):
            values = {
                f"{key}.{name}.{index}": value
                for index, value in enumerate(field_value)
            }
        else:
            values = {f"{key}.{name}": field_value}
        for place, value in values.items():
            if isinstance(value, Config):
                places |= _list_config_places(place, value)
            elif _has_path(hints[name]):
                places[place] = value
    return places


def _has_path(hint: object) -> bool:
    """Returns whether a field's type is, or holds, a local path."""
    return hint == LocalPath or any(_has_path(part) for part in get_args(hint))


def _names_rows(run: RunConfig) -> bool:
    """Returns whether the files of a task's rows are named."""
    setting = run.task.files_setting
    return setting is not None and any(
        key.startswith(f"task.{setting}.") for key in list_places(run)
    )


def _names_tokenizer(run: RunConfig) -> bool:
    return bool(run.tokenizer.path or run.train.start_from)


def _check_data(run: RunConfig) -> None:
    """Checks that a run names data, and what its tokens are made or read with."""
    reads_text = run.task.reads_text
    if reads_text and not run.data.sources:
        fix = "name documents or a store there"
        raise MaxlmError("no text to train on", where="data.sources", fix=fix)
    files_setting = run.task.files_setting
    if not reads_text and files_setting is not None and not _names_rows(run):
        fix = "name a .jsonl or .parquet file there"
        where = f"task.{files_setting}"
        raise MaxlmError("no rows to train on", where=where, fix=fix)
    if _names_tokenizer(run) or any(source.documents for source in run.data.sources):
        return
    if reads_text:
        message = "a store was made with a tokenizer, and none is named"
        fix = "name the folder of the tokenizer the stores were built with"
    else:
        message = "rows are read with a tokenizer, and none is named"
        fix = "name its folder, or a model to start from (train.start_from)"
    raise MaxlmError(message, where="tokenizer.path", fix=fix)


def _check_path(
    key: str, place: str, scheduler: JobScheduler, mounts: Sequence[Mount] | None
) -> None:
    """Checks a path on hosts that lack this machine's files. ``mounts``: what the job's
    container sees; None: it runs in none."""
    if not place.startswith("/"):
        name = "runs" if key == "folder" else place.lstrip("./~")
        message = f"{key}={place} is another one on each host"
        raise MaxlmError(message, fix=f"name one that all see: {key}=/data/{name}")
    path = PurePosixPath(normpath(place))
    if mounts is None or any(path.is_relative_to(mount.path) for mount in mounts):
        return
    top = PurePosixPath(*path.parts[:2])
    mount = f"--mount {scheduler.suggest_mount(top)}"
    if key == "folder":
        message = f"{key}={place} would be lost with its hosts"
        raise MaxlmError(message, fix=f"mount what is to keep it: {mount}")
    message = f"{key}={place} is not in the container"
    raise MaxlmError(message, fix=f"mount what holds it: {mount}")
