"""What a run goes on from: its own checkpoints, another run's, or another run's parameters."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from pydantic import ValidationError

from maxlm.config import MaxlmError
from maxlm.data.store import TokenStore
from maxlm.data.store.manifest import read_manifest
from maxlm.models.params import Params
from maxlm.programs.prepare import Corpus, check_prepared, without_settings
from maxlm.programs.setup import Setup
from maxlm.run import IDENTITY, INCIDENTAL, RunConfig
from maxlm.runtime.collectives import broadcast_from_process_0
from maxlm.runtime.files import replacing
from maxlm.train.anomaly import Verdict
from maxlm.train.checkpoint import Checkpointer, check_same, group_sizes
from maxlm.train.checkpoint.tiers import Found, Skipped, Tiers
from maxlm.train.config import CheckpointConfig
from maxlm.train.records import read_records
from maxlm.train.skips import Range, Skips, batch_number, same_batches
from maxlm.train.state import TrainState, remove_frozen

Say = Callable[[str], None]
_SKIPS = "skipped_batches.json"


@dataclass(frozen=True)
class Origin:
    """Checkpoints to go on from, newest first; there is one at least."""

    tiers: Tiers
    own: bool
    """They are this run's, not those of another that it resumes."""
    found: list[Found]
    skipped: list[Skipped]
    """Those that cannot be read, as far as is known yet."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.found[0].metadata

    def renewed(self) -> "Origin":
        """With what is there by now, if another run may have gone on, and deleted its old ones."""
        if self.own:
            return self
        self.tiers.keeper.reload()
        found, skipped = self.tiers.found()
        return replace(self, found=found, skipped=skipped) if found else self


def find_origin(
    setup: Setup,
    tiers: Tiers,
    folder: Path,
    resume: str | Path | None,
    stack: ExitStack,
    say: Say,
) -> Origin | None:
    """This run's own checkpoints, else those of the one to resume, else None.

    What is left of a run's own and cannot be gone on from is told of, and cleared away.

    Raises:
        MaxlmError: they, or the text prepared here, are of another config; none of them can be
            read; none to resume from.
    """
    own = Origin(tiers, True, *tiers.found())
    if not own.found:
        if any(each.damaged and each.tier != "local" for each in own.skipped):
            raise none_readable(own.tiers, own.skipped)
        check_not_lost(own.tiers, resume)
        for each in own.skipped:
            say(str(each))
        tiers.set_aside(own.skipped, 0)
    if not own.found and resume is not None:
        home = Path(resume) / "checkpoints"
        if not home.is_dir():
            fix = "name a run that has saved one"
            raise MaxlmError("no checkpoints here", where=str(home), fix=fix)
        grouped = group_sizes(setup.specs)
        other = Tiers(home, "", CheckpointConfig(), grouped=grouped, read_only=True)
        own = Origin(stack.enter_context(other), False, *other.found())
        if not own.found and own.skipped:
            raise none_readable(own.tiers, own.skipped)
        if not own.found:
            raise MaxlmError("no checkpoint here", where=str(home), fix="train for longer")
    if not own.found:
        check_prepared(setup.config, folder)
        return None
    now = lasting(setup.config.model_dump(mode="json"))
    saved = lasting(_completed(dict(own.metadata["config"])))
    check_same(saved, now, IDENTITY, own.tiers.place(own.found[0].tier))
    return own


@dataclass(frozen=True)
class Position:
    """Where training goes on."""

    state: TrainState
    step: int
    place: str = ""
    """Of the checkpoint."""
    losses: Mapping[str, Any] | None = None
    """What the watch over losses remembers."""
    skipped: Sequence[Skipped] = ()
    """Newer checkpoints that cannot be gone on from."""

    def with_frozen(self, frozen: dict[str, Params]) -> "Position":
        """Return it with the parameters of the task's other models in its state."""
        return replace(self, state=replace(self.state, frozen=frozen))


def none_readable(tiers: Tiers, skipped: Sequence[Skipped]) -> MaxlmError:
    """Training never begins anew where it had come far."""
    what = f"no checkpoint can be gone on from: {', '.join(map(str, skipped))}"
    return _begin_elsewhere(tiers, what, "repair one")


def _begin_elsewhere(tiers: Tiers, what: str, fix: str) -> MaxlmError:
    copies = f" and {tiers.place('remote')}" if tiers.config.remote_folder else ""
    anew = f"to begin anew, move {tiers.folder.parent}{copies} away, or set another name=..."
    return MaxlmError(what, where=str(tiers.folder), fix=f"{fix}; {anew}")


def check_not_lost(tiers: Tiers, resume: str | Path | None) -> None:
    """Check, where no checkpoint is left, that by the run's events there was none to go on from.

    Args:
        resume: the other run whose checkpoints are gone on from, if any.

    Raises:
        MaxlmError: a checkpoint was saved, or another run's gone on from.
    """
    saved, other = set[int](), None
    events = list(_events(tiers.folder.parent))
    # Earlier versions record only that a save began; that it ended shows in the next one.
    old = not any(event.get("event") == "saved" for event in events)
    begun = set[int]()
    for event in events:
        kind, step = event.get("event"), event.get("step", 0)
        if kind == "saved":
            saved.add(step)
        elif old and kind == "checkpoint" and event.get("tier") == "folder":
            saved, begun = saved | begun, {step}
        elif kind in ("start", "resume", "rollback", "discard"):
            saved, begun = {each for each in saved if each <= step}, set()
        if kind in ("start", "resume"):
            other = event.get("run")
    newest, other = broadcast_from_process_0([max(saved, default=None), other])
    if newest is not None:
        what = f"no checkpoint is left, but one of step {newest} was saved"
        raise _begin_elsewhere(tiers, what, "put it back")
    if other is not None and resume is None:
        what = f"no checkpoint is here, and the run goes on from {other}"
        raise _begin_elsewhere(tiers, what, f"give --resume {other} again")


def go_on(setup: Setup, origin: Origin, skips: Skips, fresh: Callable[[], TrainState]) -> Position:
    """The newest state that can be read, and was trained on this run's batches.

    Args:
        fresh: the state a run begins with. Hosts' own disks are a help and no promise: if they
            alone had checkpoints, and none is of use to these hosts, the run begins anew.

    Raises:
        MaxlmError: there is none.
    """

    def refuse(checkpoint: Found) -> str | None:
        if same_batches(checkpoint.step, ranges(checkpoint.metadata), skips):
            return None
        return "it was trained on batches that are left out since"

    state, found, skipped = origin.tiers.restore_newest(
        origin.found, remove_frozen(setup.abstract_state), refuse
    )
    skipped = sorted([*origin.skipped, *skipped], key=lambda each: -each.step)
    if found is None:
        if any(each.tier != "local" for each in skipped):
            raise none_readable(origin.tiers, skipped)
        origin.tiers.set_aside(skipped, 0)
        return Position(fresh(), 0, skipped=skipped)
    if origin.own:
        origin.tiers.set_aside(skipped, found.step)
    newer = [each for each in skipped if each.step >= found.step]
    place = origin.tiers.place(found.tier)
    return Position(state, found.step, place, found.metadata.get("losses"), newer)


def go_back(
    setup: Setup,
    tiers: Tiers,
    verdict: Verdict,
    skips: Skips,
    folder: Path,
    begin: Callable[[], Position],
    fresh: Callable[[], TrainState],
    event: Callable[..., None],
) -> tuple[Position, Skips]:
    """The state of the newest checkpoint from before the numbers went bad, and the batches left
    out from there on: also those since, as Chowdhery et al. 2022 (PaLM, section 5.1) did.

    Args:
        begin: the position the run began at, if it has no such checkpoint.
        fresh: see ``go_on``.
        event: told (``"discard"``, step) before all checkpoints after ``step`` are deleted.
    """
    tiers.wait()
    tiers.stop_copying()  # of a state that may be bad
    origin = Origin(tiers, True, *tiers.found())
    before = [each.step for each in origin.found if each.step < verdict.first]
    position = None if before else begin()
    base = position.step if position else max(before)
    skip = batch_number(base, skips), batch_number(verdict.last - 1, skips)
    if position is not None:
        # Before the record: a run killed between the two would have checkpoints, all refused.
        abandoned = [Skipped(each.step, each.tier, "", damaged=False) for each in origin.found]
        event("discard", base)
        tiers.set_aside(abandoned, base)
    if jax.process_index() == 0:
        _write_skip(folder, skips, skip, verdict.reason)
    skips = (*skips, skip)
    return position or go_on(setup, origin, skips, fresh), skips


def times_gone_back(folder: Path) -> int:
    """How often this run has, in its life; batches that it was told to leave out do not count."""
    return broadcast_from_process_0(sum(e.get("event") == "rollback" for e in _events(folder)))


def _events(folder: Path) -> Iterable[Mapping[str, Any]]:
    """Return the run's events, on process 0."""
    return read_records(folder / "events.jsonl") if jax.process_index() == 0 else ()


def too_often(verdict: Verdict, times: int, folder: Path) -> MaxlmError:
    """The end of a run that has gone back as often as it may."""
    return MaxlmError(
        f"{verdict.reason} at step {verdict.last}, and the run has gone back {times} "
        f"time{'' if times == 1 else 's'}",
        where=str(folder),
        fix="lower schedule.learning_rate in another run folder (--resume), or raise "
        "faults.max_rollbacks",
    )


def ranges(metadata: Mapping[str, Any]) -> Skips:
    """The batches that a checkpoint's run had left out by then."""
    return tuple((first, last) for first, last in metadata.get("skipped_batches", ()))


def read_skips(folder: Path, origin: Origin | None) -> Skips:
    """Batches that this run leaves out: by its own record, else its newest checkpoint's.

    Raises:
        MaxlmError: the record is damaged.
    """
    path = folder / _SKIPS
    record = None
    if jax.process_index() == 0 and path.exists():
        try:
            record = [_range(each["batches"]) for each in json.loads(path.read_text())]
        except (ValueError, TypeError, KeyError):
            record = "damaged"
    record = broadcast_from_process_0(record)
    if record == "damaged":
        fix = 'write it anew from the rollbacks in events.jsonl: [{"batches": [first, last]}]'
        raise MaxlmError("is no list of ranges of batches", where=str(path), fix=fix)
    if record is None:
        return ranges(origin.metadata) if origin else ()
    return tuple((first, last) for first, last in record)


def _range(written: Any) -> Range:
    """
    Raises:
        ValueError, TypeError: these are no first and last batch.
    """
    first, last = written
    if not all(type(n) is int for n in (first, last)) or not 0 <= first <= last:
        raise ValueError(written)
    return first, last


def _write_skip(folder: Path, skips: Skips, skip: Range, reason: str) -> None:
    """Add to the record, before anything is done about it."""
    path = folder / _SKIPS
    known = json.loads(path.read_text()) if path.exists() else [{"batches": each} for each in skips]
    with replacing(path) as temporary:
        entries = [*known, {"batches": skip, "reason": reason}]
        temporary.write_text(f"{json.dumps(entries, indent=2)}\n")


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved config with the settings that are newer than it, at their defaults."""
    try:
        return RunConfig.model_validate(saved).model_dump(mode="json")
    except (ValidationError, MaxlmError):  # What is wrong with it shows in the comparison.
        return saved


def described(store: TokenStore) -> dict[str, Any]:
    """What tells whether a store still holds the documents that it held."""
    counts = {"documents": store.num_documents, "tokens": store.num_tokens}
    digest = store.manifest.tokens_sha256  # None: an older version made the store.
    return counts | {"offsets_sha256": store.offsets_sha256, "tokens_sha256": digest}


def check_stores(
    config: RunConfig,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    corpus: Corpus,
    where: str,
) -> None:
    """
    Raises:
        MaxlmError: a store is not what it was when the checkpoint was written.
    """
    for source in config.data.sources:
        name = source.name
        # An older run, or store, has no hash of tokens.
        if name not in before or all(
            now[name][key] == value or None in (now[name][key], value)
            for key, value in before[name].items()
        ):
            continue
        was, became = (
            f"{each['documents']:,} documents, {each['tokens']:,} tokens"
            for each in (before[name], now[name])
        )
        fix = "give it the documents that it had, or train in another run folder"
        whole = read_manifest(corpus.training[name].place)
        for count in range(1, len(whole.segments) + 1 if source.store else 1):
            if whole.first(count).offsets_sha256 == before[name]["offsets_sha256"]:
                fix = f"set store_segments: {count} for it, or train in another run folder"
        what = f"the store of source {name!r} is not what it was ({was}; now {became})"
        raise MaxlmError(what, where=where, fix=fix)


def find_beginning(setup: Setup, stack: ExitStack) -> Checkpointer | None:
    """The checkpoints of the run whose parameters this one is to start from, if there is one.

    Raises:
        MaxlmError: none there, or of another model.
    """
    home = setup.config.train.start_from
    if home is None:
        return None
    folder = Path(home) / "checkpoints"
    keeper = stack.enter_context(
        Checkpointer(folder, read_only=True, grouped=group_sizes(setup.specs))
    )
    keeper.check_params(None, setup.abstract_state.params, _averaged(keeper))
    return keeper


def _averaged(keeper: Checkpointer) -> str:
    """Under which name the parameters are that a run is judged by."""
    average = keeper.metadata()["config"]["train"].get("ema_decay") is not None
    return "ema" if average else "params"


def started(setup: Setup, beginning: Checkpointer | None) -> TrainState:
    """A fresh state, with another run's parameters where there is one."""
    state = setup.init()
    if beginning is None:
        return state
    abstract = setup.abstract_state.params
    beginning.reload()  # It may be of a run that goes on, and deletes its old ones.
    params = beginning.restore_params(None, abstract, _averaged(beginning))
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, ema=ema)


def published(saved: Mapping[str, Any], tokenizer: str) -> dict[str, dict[str, Any]]:
    """What export should know of the published model that the parameters once were, if any: its
    family and, while the tokenizer is still its own, its token ids."""
    if (known := saved.get("published")) is None:
        return {}
    kept = ("family", "tokens") if saved["tokenizer"] == tokenizer else ("family",)
    return {"published": {key: known[key] for key in kept if key in known}}


def lasting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the settings that may change from one start to the next.

    ``store_segments`` may so that a run can go on after an append to its store: what the store
    then holds is compared.
    """
    config = without_settings(config, ("store_segments",))
    return {
        part: {k: v for k, v in settings.items() if f"{part}.{k}" not in INCIDENTAL}
        if isinstance(settings, Mapping)
        else settings
        for part, settings in config.items()
    }
