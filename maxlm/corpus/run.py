"""Running a recipe: each stage over each shard, going on where an earlier run
stopped."""

import hashlib
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

from maxlm.config import MaxlmError
from maxlm.corpus.indexing import index_kept_texts
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
    """Reads the sources and labels the documents; returns the corpus's folder.

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
    _check_rules(recipe)
    packages: list[str] = [*_PACKAGES]
    for step in steps:
        stage_packages = step.stage.list_packages()
        check_packages(stage_packages, f"the stage {step.stage.unique_name}")
        packages += stage_packages
    _check_place(folder, recipe)
    jobs, num_binary_files = plan_shards(folder, recipe.sources, recipe.shard_bytes)
    _check_outside(folder, jobs)

    shard_names = [job.shard.name for job in jobs]
    keys = _make_keys(steps, shard_names, num_binary_files)
    with ExitStack() as stack:
        stack.enter_context(lock_folder(folder))
        if executor is None:
            executor = stack.enter_context(WorkerPool(recipe.workers))
        executor.require_on_workers(folder, packages)
        # Before anything else, so that a run that is stopped leaves no corpus of two
        # recipes.
        for stage_name, key in keys.items():
            _forget_stale_manifest(folder / stage_name, key, shard_names)
        _write_json(folder / RECIPE, recipe.model_dump(mode="json"))
        runner = JobRunner(DOCUMENTS, executor, progress)
        _read_sources(folder, keys[DOCUMENTS], jobs, num_binary_files, recipe, runner)
        for step in steps:
            name = step.stage.unique_name
            runner = JobRunner(name, executor, progress)
            _run_step(folder, step, keys[name], shard_names, runner)
        index_kept_texts(folder, executor, progress)
    return folder


def _check_rules(recipe: RecipeConfig) -> None:
    """Raises MaxlmError for rules of what is kept that name no label, or whose verdicts
    cannot be settled."""
    rules = resolve_rules(recipe, recipe.keep, recipe.cut, error_location="")
    plan_verdicts(recipe, rules, error_location="")


def _make_keys(
    steps: Sequence[BoundStage], shard_names: Sequence[str], num_binary_files: int
) -> dict[str, str]:
    """Makes the key of each stage, by its name: if it is another than a run before has
    written, the stage is done again."""
    documents = hashlib.sha256("".join(shard_names).encode()).hexdigest()
    keys = {DOCUMENTS: f"{documents} {num_binary_files}"}
    for step in steps:
        key = step.fingerprint
        if step.is_cross_document:  # Its labels depend on which others there are.
            key = f"{key} {documents}"
        keys[step.stage.unique_name] = key
    return keys


def _check_place(folder: Path, recipe: RecipeConfig) -> None:
    """Checks that a folder is a corpus's, or can become one."""
    fix = "choose another out"
    if folder.exists() and not folder.is_dir():
        raise MaxlmError("this is a file", where=str(folder), fix=fix)
    if folder.exists() and any(folder.iterdir()) and not (folder / "lock").exists():
        message = "this folder is not empty, and holds no corpus"
        raise MaxlmError(message, where=str(folder), fix=f"{fix}, or empty the folder")
    for source in recipe.sources:
        for entry in source.documents:
            if folder.resolve().is_relative_to(Path(entry).expanduser().resolve()):
                message = f"the corpus would lie inside {entry}, which it is made of"
                raise MaxlmError(message, where=str(folder), fix=fix)


def _check_outside(folder: Path, jobs: Sequence[ReadJob]) -> None:
    """Checks that no source lies in the corpus's folder: where a pattern matches what a
    run writes there, the next run would read it as documents."""
    corpus = folder.resolve()
    for job in jobs:
        for part in job.slices:
            file = part.file
            if file.path.resolve().is_relative_to(corpus):
                message = f"the corpus would be made of its own file {file.name}"
                fix = "choose another out, or sources that leave it out"
                raise MaxlmError(message, where=str(folder), fix=fix)


def _forget_stale_manifest(
    stage_folder: Path, key: str, shard_names: Sequence[str]
) -> None:
    """Deletes a stage's manifest if it is of another key or of other shards, or cannot
    be read."""
    path = stage_folder / MANIFEST
    manifest = None
    with suppress(OSError, ValueError):  # There is none, or it is damaged.
        manifest = json.loads(verify_and_strip_json_digest(path.read_text("utf-8")))
    if isinstance(manifest, dict):
        has_key = manifest.get("key") == key
        if has_key and list(manifest.get("shards", ())) == list(shard_names):
            return
    with convert_write_errors(path):
        path.unlink(missing_ok=True)


def _read_sources(
    folder: Path,
    key: str,
    jobs: Sequence[ReadJob],
    num_binary_files: int,
    recipe: RecipeConfig,
    run_jobs: JobRunner,
) -> None:
    """Reads the sources into the shards of documents that are not there."""

    def read(pending: Sequence[StageShardView]) -> None:
        names = {shard.name for shard in pending}
        pending_jobs = [job for job in jobs if job.shard.name in names]
        num_done = len(jobs) - len(pending_jobs)
        run_jobs(write_document_shard, pending_jobs, num_done=num_done)

    details = {
        "key": key,
        "sources": [source.model_dump(mode="json") for source in recipe.sources],
    }
    _make_shards(
        folder / DOCUMENTS,
        [job.shard for job in jobs],
        read,
        details,
        packages=(),
        counts={"binary_files": num_binary_files},
    )


def _run_step(
    folder: Path,
    step: BoundStage,
    key: str,
    shard_names: Sequence[str],
    run_jobs: JobRunner,
) -> None:
    """Writes the labels of a stage that are not there."""
    stage = step.stage
    stage_folder = folder / stage.unique_name
    scratch = stage_folder / "scratch"
    shards = [
        StageShardView(
            folder,
            name,
            text_stages=step.text_stages,
            where=step.where,
            output_stage=stage.unique_name,
        )
        for name in shard_names
    ]

    def label(pending: list[StageShardView]) -> None:
        if isinstance(stage, PerDocumentStage):
            # The largest first, or all would wait for one that begins last.
            pending.sort(key=lambda shard: -shard.path(DOCUMENTS).stat().st_size)
            num_done = len(shards) - len(pending)
            run_jobs(ShardLabeller(stage), pending, num_done=num_done)
        else:
            assert isinstance(stage, CrossDocumentStage)
            with convert_write_errors(stage_folder):
                scratch.mkdir(exist_ok=True)
            # All of them: each is compared with the others.
            stage.label(shards, scratch, run_jobs)

    with convert_write_errors(stage_folder):
        _clear_stale_labels(folder, stage_folder, key)
    details = {
        "key": key,
        "stage": stage.model_dump(mode="json"),
        "version": stage.version,
    }
    _make_shards(stage_folder, shards, label, details, stage.list_packages())
    shutil.rmtree(scratch, ignore_errors=True)


def _clear_stale_labels(folder: Path, stage_folder: Path, key: str) -> None:
    """Makes a stage's folder, empty but for its key if it has labels of another key."""
    stage_folder.mkdir(exist_ok=True)
    key_path = stage_folder / "key"
    had_key = key_path.exists()
    if had_key and key_path.read_text() == key:
        return
    if had_key:
        # Settled labels were made of those that are deleted now.
        shutil.rmtree(folder / SETTLED, ignore_errors=True)
    shutil.rmtree(stage_folder)
    stage_folder.mkdir()
    with replace_file(key_path) as new:
        new.write_text(key)


def _make_shards(
    stage_folder: Path,
    shards: Sequence[StageShardView],
    make: Callable[[list[StageShardView]], None],
    details: Mapping[str, object],
    packages: Sequence[str],
    counts: Mapping[str, int] | None = None,
) -> None:
    """Makes the shards of a stage that are not there, then its manifest; deletes the
    shards of files that are no longer sources.

    Args:
        make: makes shards of the stage.
        details, counts: entries of the manifest, and of its counts, beside those of all
            stages.
        packages: those whose versions the manifest tells, beside those of all stages.
    """
    began = time.time()
    paths = {shard.name: shard.path(stage_folder.name) for shard in shards}
    # By a listing: a network disk may remember for a while that a file which was asked
    # for by name was not there.
    present = set(stage_folder.glob("*.parquet"))
    pending = [shard for shard in shards if paths[shard.name] not in present]
    # Without its list of checksums (of an earlier maxlm, or deleted) a stage gets one
    # now.
    has_manifest = (stage_folder / MANIFEST).exists()
    has_checksums = (stage_folder / CHECKSUMS_NAME).exists()
    if not pending and has_manifest and has_checksums:
        return
    # By these, shards that are not written now keep the checksums that they have: what
    # has damaged one since must not become what it is checked against.
    identities_before = read_file_identities(paths.values())
    if pending:
        make(pending)
    # Also unfinished files of killed workers; one may live on unseen.
    files = {*stage_folder.glob("*.parquet"), *stage_folder.glob(".*.parquet.*")}
    for path in files.difference(paths.values()):
        path.unlink(missing_ok=True)

    counts_by_shard = {name: read_counts(path) for name, path in paths.items()}
    total: Counter[str] = Counter()
    for shard_counts in counts_by_shard.values():
        total.update(shard_counts)  # A sum of Counters would drop what is 0.
    # A corpus without shards has these two all the same.
    all_counts = {"rows": 0, "labelled": 0}
    all_counts |= counts or {}
    all_counts |= dict(sorted(total.items()))
    rows_by_shard = {
        name: shard_counts["rows"] for name, shard_counts in counts_by_shard.items()
    }
    versions = {name: version(name) for name in (*_PACKAGES, *packages)}
    checksums_sha256 = write_shard_checksums(
        stage_folder, list(paths.values()), identities_before
    )
    manifest = {
        **details,
        "counts": all_counts,
        "shards": rows_by_shard,
        "checksums_sha256": checksums_sha256,
        "last_run": {
            "shards": len(pending),  # Others may be of earlier runs.
            "packages": versions,
            "python": platform.python_version(),
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": round(time.time() - began, 3),
        },
    }
    _write_json(stage_folder / MANIFEST, manifest)


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_json_with_digest(path, json.dumps(content, indent=1, ensure_ascii=False))
