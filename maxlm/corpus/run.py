"""Running a recipe: each stage over each shard, going on where an earlier run stopped."""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.corpus.opened import get_manifest_path
from maxlm.corpus.reading import ReadJob, ReadPlan, plan_shards, read_shard
from maxlm.corpus.recipe import BoundStage, RecipeConfig, get_recipe_path, resolve
from maxlm.corpus.shards import DOCUMENTS, StageShardView, add_counts, read_counts
from maxlm.corpus.stage import CorpusStage, LabelStage, ShardLabeller
from maxlm.runtime.executor import Executor, open_executor
from maxlm.runtime.files import (
    convert_write_errors,
    hash_file,
    lock_folder,
    replace_file,
    strip_digest,
    write_json,
)
from maxlm.runtime.pool import count_workers
from maxlm.runtime.progress import Progress, ignore_progress

_PACKAGES = ("maxlm", "pyarrow", "numpy")


def run_recipe(recipe: RecipeConfig, progress: Progress = ignore_progress) -> Path:
    """Read the sources and label the documents; returns the corpus's folder.

    A shard's labels are one file that appears when complete, so a run that was stopped or killed,
    or that met a full disk, goes on from the shards that are missing, and ends with the same files
    as an unbroken one. A stage whose settings, or whose input's settings, have changed is done
    again, and so are the stages that read its labels; nothing else is.

    Raises:
        MaxlmError: a wrong recipe (before anything is written), sources that are not there, a
            missing package or model, a disk that is full, or a stage's alarm.
    """
    folder = Path(recipe.out).expanduser()
    steps = resolve(recipe)
    _check_place(folder, recipe)
    planned = plan_shards(folder, recipe.sources, recipe.shard_bytes)
    _check_outside(folder, planned.jobs)
    shards = [job.shard for job in planned.jobs]
    if len({shard.name for shard in shards}) < len(shards):
        what = "a source names the same files twice"
        raise MaxlmError(what, where="sources", fix="name each file once")
    documents = hashlib.sha256("".join(shard.name for shard in shards).encode()).hexdigest()
    keys = {step.stage.title: _key(step, documents) for step in steps}
    read = f"{documents} {planned.num_binary}"
    with lock_folder(folder), open_executor(recipe.engine, recipe.workers) as engine:
        # Before anything else, so that a run that is stopped leaves no corpus of two recipes.
        for title, key in {DOCUMENTS: read, **keys}.items():
            _forget_stale_manifest(folder / title, key, [shard.name for shard in shards])
        _write_json(get_recipe_path(folder), recipe.model_dump(mode="json"))
        _read(folder, read, planned, recipe, engine, progress)
        for step in steps:
            _run_step(folder, step, keys[step.stage.title], shards, engine, progress)
    return folder


def _check_place(folder: Path, recipe: RecipeConfig) -> None:
    fix = "choose another out"
    if folder.exists() and not folder.is_dir():
        raise MaxlmError("this is a file", where=str(folder), fix=fix)
    if folder.exists() and any(folder.iterdir()) and not (folder / "lock").exists():
        what = "this folder holds something else than a corpus"
        raise MaxlmError(what, where=str(folder), fix=f"{fix}, or empty the folder")
    for source in recipe.sources:
        for entry in source.documents:
            if folder.resolve().is_relative_to(Path(entry).expanduser().resolve()):
                what = f"the corpus would lie inside {entry}, which it is made of"
                raise MaxlmError(what, where=str(folder), fix=fix)


def _check_outside(folder: Path, jobs: Sequence[ReadJob]) -> None:
    """A pattern may match what a run has written, of which the next would make documents."""
    home = folder.resolve()
    for job in jobs:
        for part in job.slices:
            if part.file.path.resolve().is_relative_to(home):
                what = f"the corpus would be made of its own file {part.file.name}"
                fix = "choose another out, or sources that leave it out"
                raise MaxlmError(what, where=str(folder), fix=fix)


def _key(step: BoundStage, documents: str) -> str:
    """Makes the key of a stage's labels, which may depend on which documents there are."""
    return f"{step.key} {documents}" if step.whole else step.key


def _forget_stale_manifest(home: Path, key: str, shards: Sequence[str]) -> None:
    path = get_manifest_path(home)
    try:
        manifest = json.loads(strip_digest(path.read_text("utf-8")))
        if manifest["key"] == key and list(manifest["shards"]) == list(shards):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    with convert_write_errors(path):
        path.unlink(missing_ok=True)


def _read(
    folder: Path,
    key: str,
    planned: ReadPlan,
    recipe: RecipeConfig,
    engine: Executor,
    progress: Progress,
) -> None:
    began, jobs = time.time(), planned.jobs
    pending = [job for job in jobs if not job.shard.path(DOCUMENTS).exists()]
    _map(DOCUMENTS, read_shard, pending, len(jobs), engine, progress)
    sources = [source.model_dump(mode="json") for source in recipe.sources]
    shards = [job.shard for job in jobs]
    inputs = [
        {"shard": job.shard.name, "files": list(dict.fromkeys(s.file.name for s in job.slices))}
        for job in jobs
    ]
    if pending or not get_manifest_path(folder / DOCUMENTS).exists():
        details = {"key": key, "sources": sources, "inputs": inputs}
        last = _last_run(began, len(pending), ())
        _finish(folder, DOCUMENTS, shards, details, last, {"binary_files": planned.num_binary})


def _run_step(
    folder: Path,
    step: BoundStage,
    key: str,
    shards: Sequence[StageShardView],
    engine: Executor,
    progress: Progress,
) -> None:
    began, title = time.time(), step.stage.title
    home = folder / title
    views = [StageShardView(folder, s.name, step.texts, step.where, title) for s in shards]
    with convert_write_errors(home):
        _forget_other_labels(home, key)
    pending = [view for view in views if not view.path(title).exists()]
    if isinstance(step.stage, LabelStage):
        # The largest first, or all would wait for one that begins last.
        pending.sort(key=lambda view: -view.path(DOCUMENTS).stat().st_size)
        _map(title, ShardLabeller(step.stage), pending, len(views), engine, progress)
    elif isinstance(step.stage, CorpusStage) and (pending or not get_manifest_path(home).exists()):
        scratch = home / "scratch"
        with convert_write_errors(home):
            scratch.mkdir(exist_ok=True)
        step.stage.label(views, scratch, engine, progress)
    details = {
        "key": key,
        "stage": step.stage.model_dump(mode="json"),
        "version": step.stage.version,
        "reads": list(step.stage.reads),
        "texts": list(step.texts),
    }
    if pending or not get_manifest_path(home).exists():
        last = _last_run(began, len(pending), step.stage.packages())
        _finish(folder, title, shards, details, last)
    with convert_write_errors(home):
        shutil.rmtree(home / "scratch", ignore_errors=True)


def _map(
    title: str, function: Any, jobs: Sequence[Any], total: int, engine: Executor, progress: Progress
) -> None:
    done = total - len(jobs)
    progress(title, done, total)
    for _ in engine.map(function, jobs):
        done += 1
        progress(title, done, total)


def _forget_other_labels(home: Path, key: str) -> None:
    """Empty a stage's folder if its labels are of other settings or inputs."""
    home.mkdir(exist_ok=True)
    path = home / "key"
    if path.exists():
        if path.read_text() == key:
            return
        shutil.rmtree(home.parent / "settled", ignore_errors=True)
    shutil.rmtree(home)
    home.mkdir()
    with replace_file(path) as new:
        new.write_text(key)


def _finish(
    folder: Path,
    title: str,
    shards: Sequence[StageShardView],
    details: dict[str, Any],
    last_run: dict[str, Any],
    more_counts: Mapping[str, int] | None = None,
) -> None:
    """Write a stage's manifest, and delete the shards of files that are no longer sources."""
    home = folder / title
    with convert_write_errors(home):
        home.mkdir(exist_ok=True)
    wanted = {shard.path(title).name for shard in shards}
    for path in home.glob("*.parquet"):
        if path.name not in wanted:
            path.unlink()
    for path in home.glob(".*.parquet.*"):
        path.unlink()  # Left by a killed worker.
    counts = {shard.name: read_counts(shard.path(title)) for shard in shards}
    with ThreadPoolExecutor(count_workers()) as threads:
        digests = list(threads.map(hash_file, (shard.path(title) for shard in shards)))
    _write_json(
        get_manifest_path(home),
        details
        | {
            "counts": {"rows": 0, "labelled": 0, **(more_counts or {})}
            | add_counts(counts.values()),
            "shards": {name: each["rows"] for name, each in counts.items()},
            "shards_sha256": dict(zip(counts, digests, strict=True)),
            "last_run": last_run,
        },
    )


def _last_run(began: float, shards: int, packages: Sequence[str]) -> dict[str, Any]:
    """How the shards were made that were made in this run; others may be of earlier ones."""
    return {
        "shards": shards,
        "packages": {name: _version(name) for name in (*_PACKAGES, *packages)},
        "python": platform.python_version(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "seconds": round(time.time() - began, 3),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _write_json(path: Path, content: Any) -> None:
    write_json(path, json.dumps(content, indent=1, ensure_ascii=False))
