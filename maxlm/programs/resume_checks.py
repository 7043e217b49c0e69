"""Checks before a run resumes: its config and text are the same, and no checkpoint was lost."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.data.store import TokenStore
from maxlm.data.store.manifest import read_manifest
from maxlm.programs.prepare import PreparedData, remove_source_settings
from maxlm.run import IDENTITY, INCIDENTAL, RunConfig
from maxlm.runtime.collectives import run_on_process_0
from maxlm.train.checkpoint import Checkpointer, SkippedCheckpoint, check_same_settings
from maxlm.train.records import read_records


def make_run_metadata(
    config: RunConfig,
    data: PreparedData,
    source_metadata: Mapping[str, Any] | None,
    frozen_models: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the metadata of a run's checkpoints; ``source_metadata``: that of the
    checkpoint whose state or parameters the run starts from."""
    tokenizer = data.tokenizer.fingerprint
    metadata = {
        "config": config.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "stores": {name: _describe_store(store) for name, store in data.train_stores.items()},
    }
    # An export needs to know of the published model that the parameters came from, if any, its
    # family and, while the tokenizer is still its own, its token ids.
    if source_metadata and (known := source_metadata.get("published")) is not None:
        kept = ("family", "tokens") if source_metadata["tokenizer"] == tokenizer else ("family",)
        metadata["published"] = {key: known[key] for key in kept if key in known}
    return metadata | ({"frozen": frozen_models} if frozen_models else {})


def check_same_inputs(
    config: RunConfig,
    data: PreparedData,
    saved_metadata: Mapping[str, Any],
    new_metadata: Mapping[str, Any],
    error_location: str,
) -> None:
    """Checks that a checkpoint to resume from was made with this tokenizer, these frozen models and
    stores; ``saved_metadata`` and ``new_metadata``: its metadata, and of those to come."""
    check_same_settings(saved_metadata, new_metadata, ("tokenizer",), error_location)
    for name, model in new_metadata.get("frozen", {}).items():
        was = saved_metadata.get("frozen", {}).get(name, {})
        if was.get("fingerprint") != model["fingerprint"]:
            what = f"the frozen model {name!r} from {model['source']} is not the one that training "
            what += f"began with, from {was.get('source', 'nowhere')}"
            fix = "put its parameters back, or train in another run folder"
            raise MaxlmError(what, where=error_location, fix=fix)
    before = saved_metadata.get("stores", {})  # A converted model's has none.
    for source in config.data.sources:
        name, store = source.name, new_metadata["stores"][source.name]
        if store == before.get(name, store):
            continue
        was, became = (
            f"{each['documents']:,} documents, {each['tokens']:,} tokens"
            for each in (before[name], store)
        )
        fix = "give it the documents that it had, or train in another run folder"
        manifest = read_manifest(data.train_stores[name].place)
        for count in range(1, len(manifest.segments) + 1 if source.store else 1):
            if manifest.take_segments(count).offsets_sha256 == before[name]["offsets_sha256"]:
                fix = f"set store_segments: {count} for it, or train in another run folder"
        what = f"the store of source {name!r} is not what it was ({was}; now {became})"
        raise MaxlmError(what, where=error_location, fix=fix)


def check_same_config(config: RunConfig, saved_config: Mapping[str, Any], where: str) -> None:
    """Checks the settings that must be those that the checkpoint was written with."""
    # Settings that are newer than the checkpoint get their defaults. The comparison shows what is
    # wrong with a config that is not valid.
    with suppress(ValidationError, MaxlmError):
        saved_config = RunConfig.model_validate(saved_config).model_dump(mode="json")
    saved_config = remove_changeable_settings(saved_config)
    current = remove_changeable_settings(config.model_dump(mode="json"))
    check_same_settings(saved_config, current, IDENTITY, where)


def remove_changeable_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config without the settings that may change when a run resumes.

    ``store_segments`` may, so that a run can resume after an append to its store: what the store
    then holds is compared.
    """
    config = remove_source_settings(config, ("store_segments",))
    return {
        part: {k: v for k, v in settings.items() if f"{part}.{k}" not in INCIDENTAL}
        if isinstance(settings, Mapping)
        else settings
        for part, settings in config.items()
    }


def _describe_store(store: TokenStore) -> dict[str, Any]:
    """Returns what shows whether a store still holds the same documents."""
    counts = {"documents": store.num_documents, "tokens": store.num_tokens}
    digest = store.manifest.tokens_sha256
    return counts | {"offsets_sha256": store.offsets_sha256, "tokens_sha256": digest}


def raise_no_readable_checkpoint(
    checkpointer: Checkpointer, skipped: Sequence[SkippedCheckpoint]
) -> NoReturn:
    """Raises MaxlmError for a run that can resume from none of its checkpoints. It does not start
    afresh by itself: that would throw its training away."""
    what = f"no checkpoint can be resumed from: {', '.join(map(str, skipped))}"
    raise _restart_error(checkpointer, what, "repair one")


def check_no_lost_checkpoint(checkpointer: Checkpointer, resume: str | Path | None) -> None:
    """Checks, for a run without a checkpoint, that its events report none to resume from, its own
    or another run's."""

    def read_events() -> tuple[int | None, str | None]:
        saved, other = set[int](), None
        for event in read_records(checkpointer.folder.parent / "events.jsonl"):
            kind, step = event["event"], event["step"]
            if kind == "saved":
                saved.add(step)
            elif kind in ("start", "resume", "rollback", "discard"):
                saved = {each for each in saved if each <= step}
            if kind in ("start", "resume"):
                other = event.get("run")
        return max(saved, default=None), other

    newest, other = run_on_process_0(read_events)
    if newest is not None:
        what = f"no checkpoint is left, but one of step {newest} was saved"
        raise _restart_error(checkpointer, what, "put it back")
    if other is not None and resume is None:
        what = f"no checkpoint is here, and the run resumes from {other}"
        raise _restart_error(checkpointer, what, f"give --resume {other} again")


def count_rollbacks(folder: Path) -> int:
    """Returns how often a run has rolled back in its life."""
    events = folder / "events.jsonl"
    return run_on_process_0(lambda: sum(e["event"] == "rollback" for e in read_records(events)))


def _restart_error(checkpointer: Checkpointer, what: str, fix: str) -> MaxlmError:
    copies = f" and {remote.place}" if (remote := checkpointer.remote) else ""
    restart = f"to start afresh, move {checkpointer.folder.parent}{copies} away, or set another"
    return MaxlmError(what, where=str(checkpointer.folder), fix=f"{fix}; {restart} name=...")
