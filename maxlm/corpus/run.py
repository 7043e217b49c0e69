"""Running a recipe: each stage over each shard, going on where an earlier run
stopped."""

import hashlib
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.corpus.indexing import enter_kept_texts
from maxlm.corpus.opened import MANIFEST
from maxlm.corpus.reading import ReadJob, plan_shards, write_document_shard
from maxlm.corpus.recipe import (
    RECIPE,
    BoundStage,
    RecipeConfig,
    bind_stages,
    resolve_rules,
)
from maxlm.corpus.settling import SETTLED
from maxlm.corpus.shards import (
    DOCUMENTS,
    StageShardView,
    read_counts,
    read_file_identities,
    write_shard_checksums,
)
from maxlm.corpus.stage import (
    CrossDocumentStage,
    JobRunner,
    PerDocumentStage,
    ShardLabeller,
    check_packages,
)
from maxlm.corpus.verdicts import plan_verdicts
from maxlm.runtime.checksums import CHECKSUMS_NAME
from maxlm.runtime.executor import TaskExecutor
from maxlm.runtime.files import (
    convert_write_errors,
    lock_folder,
    replace_file,
    verify_and_strip_json_digest,
    write_json_with_digest,
)
from maxlm.runtime.pool import WorkerPool
from maxlm.runtime.progress import Progress, ignore_progress

_PACKAGES = ("maxlm", "pyarrow", "numpy")


def run_recipe(
    recipe: RecipeConfig,
    progress: Progress = ignore_progress,
    executor: TaskExecutor | None = None,
) -> Path:
    """Read the sources and label the documents; returns the corpus's folder.

    Tasks run on `executor`, by default in `recipe.workers` processes of this machine;
    the files are the same everywhere.

    A shard's labels are one file that appears when complete, so a run that was stopped
    or killed, or that met a full disk, goes on from the shards that are missing, and
    ends with the same files as an unbroken one. A stage whose settings, or whose
    input's settings, have changed is done again, and so are the stages that read its
    labels; nothing else is. Raises MaxlmError: a wrong recipe (before anything is
    written), sources that are not there, a missing package or model, or a disk that is
    full."""
    folder = Path(recipe.out).expanduser()
    steps = bind_stages(recipe)
    # Before anything is written: rules that cannot be settled.
    plan_verdicts(recipe, resolve_rules(recipe, recipe.keep, recipe.cut, ""), "")
    for step in steps:
        check_packages(
            step.stage.list_packages(), f"the stage {step.stage.unique_name}"
        )
    _check_place(folder, recipe)
    jobs, binary_files = plan_shards(folder, recipe.sources, recipe.shard_bytes)
    _check_outside(folder, jobs)
    names = [job.shard.name for job in jobs]
    documents = hashlib.sha256("".join(names).encode()).hexdigest()
    keys = {DOCUMENTS: f"{documents} {binary_files}"}
    # Labels may depend on which other documents there are.
    for step in steps:
        own = (
            f"{step.fingerprint} {documents}"
            if step.is_cross_document
            else step.fingerprint
        )
        keys[step.stage.unique_name] = own
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder))
        if executor is None:
            executor = stack.enter_context(WorkerPool(recipe.workers))
        packages = (name for step in steps for name in step.stage.list_packages())
        executor.require_on_workers(folder, [*_PACKAGES, *packages])
        # Before anything else, so that a run that is stopped leaves no corpus of two
        # recipes.
        for title, key in keys.items():
            _forget_stale_manifest(folder / title, key, names)
        _write_json(folder / RECIPE, recipe.model_dump(mode="json"))
        run = JobRunner(DOCUMENTS, executor, progress)
        _read_sources(folder, keys[DOCUMENTS], jobs, binary_files, recipe, run)
        for step in steps:
            _run_step(
                folder, step, keys[step.stage.unique_name], names, executor, progress
            )
        enter_kept_texts(folder, executor, progress)
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
    """A pattern may match what a run has written, of which the next would make
    documents."""
    home = folder.resolve()
    for file in (part.file for job in jobs for part in job.slices):
        if file.path.resolve().is_relative_to(home):
            what = f"the corpus would be made of its own file {file.name}"
            fix = "choose another out, or sources that leave it out"
            raise MaxlmError(what, where=str(folder), fix=fix)


def _forget_stale_manifest(home: Path, key: str, shards: Sequence[str]) -> None:
    path = home / MANIFEST
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads(verify_and_strip_json_digest(path.read_text("utf-8")))
        if manifest["key"] == key and list(manifest["shards"]) == list(shards):
            return
    with convert_write_errors(path):
        path.unlink(missing_ok=True)


def _read_sources(
    folder: Path,
    key: str,
    jobs: Sequence[ReadJob],
    binary_files: int,
    recipe: RecipeConfig,
    run: JobRunner,
) -> None:
    def read(pending: Sequence[StageShardView]) -> None:
        names = {shard.name for shard in pending}
        left = [job for job in jobs if job.shard.name in names]
        run(write_document_shard, left, num_done=len(jobs) - len(left))

    details = {
        "key": key,
        "sources": [source.model_dump(mode="json") for source in recipe.sources],
    }
    shards = [job.shard for job in jobs]
    _make_shards(
        folder / DOCUMENTS, shards, read, details, (), binary_files=binary_files
    )


def _run_step(
    folder: Path,
    step: BoundStage,
    key: str,
    names: Sequence[str],
    executor: TaskExecutor,
    progress: Progress,
) -> None:
    stage, own = step.stage, step.stage.unique_name
    home = folder / own
    views = [
        StageShardView(folder, name, step.text_stages, step.where, own)
        for name in names
    ]
    run = JobRunner(own, executor, progress)

    def label(pending: list[StageShardView]) -> None:
        if isinstance(stage, PerDocumentStage):
            # The largest first, or all would wait for one that begins last.
            pending.sort(key=lambda view: -view.path(DOCUMENTS).stat().st_size)
            run(ShardLabeller(stage), pending, num_done=len(views) - len(pending))
        elif isinstance(stage, CrossDocumentStage):
            with convert_write_errors(home):
                (home / "scratch").mkdir(exist_ok=True)
            stage.label(views, home / "scratch", run)

    with convert_write_errors(home):
        home.mkdir(exist_ok=True)
        path = home / "key"
        if not path.exists() or path.read_text() != key:  # Labels of other inputs
            if path.exists():
                shutil.rmtree(
                    folder / SETTLED, ignore_errors=True
                )  # Of no use to anyone now.
            shutil.rmtree(home)
            home.mkdir()
            with replace_file(path) as new:
                new.write_text(key)
    details = {
        "key": key,
        "stage": stage.model_dump(mode="json"),
        "version": stage.version,
    }
    _make_shards(home, views, label, details, stage.list_packages())
    shutil.rmtree(home / "scratch", ignore_errors=True)


def _make_shards(
    home: Path,
    shards: Sequence[StageShardView],
    make: Callable[[list[StageShardView]], None],
    details: dict[str, Any],
    packages: Sequence[str],
    **counts: int,
) -> None:
    """Make the shards of a stage that are not there, then its manifest; delete the
    shards of files that are no longer sources."""
    began = time.time()
    paths = {shard.name: shard.path(home.name) for shard in shards}
    # By a listing: a network disk may remember for a while that a file which was asked
    # for by name was not there.
    present = set(home.glob("*.parquet"))
    pending = [shard for shard in shards if paths[shard.name] not in present]
    # Without its list of checksums (of an earlier maxlm, or deleted) a stage gets one
    # now.
    if not pending and all(
        (home / name).exists() for name in (MANIFEST, CHECKSUMS_NAME)
    ):
        return
    before = read_file_identities(paths.values())
    if pending:
        make(pending)
    for path in {*home.glob("*.parquet"), *home.glob(".*.parquet.*")} - {
        *paths.values()
    }:
        path.unlink(missing_ok=True)  # Also of killed workers; one may live on unseen.
    found = {name: read_counts(path) for name, path in paths.items()}
    total: Counter[str] = Counter()
    for each in found.values():  # By `update`, as a sum of Counters drops what is 0.
        total.update(each)
    manifest = details | {
        "counts": {"rows": 0, "labelled": 0, **counts} | dict(sorted(total.items())),
        "shards": {name: each["rows"] for name, each in found.items()},
        "checksums_sha256": write_shard_checksums(home, list(paths.values()), before),
        "last_run": {
            "shards": len(pending),  # Others may be of earlier runs.
            "packages": {name: version(name) for name in (*_PACKAGES, *packages)},
            "python": platform.python_version(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": round(time.time() - began, 3),
        },
    }
    _write_json(home / MANIFEST, manifest)


def _write_json(path: Path, content: Any) -> None:
    write_json_with_digest(path, json.dumps(content, indent=1, ensure_ascii=False))
