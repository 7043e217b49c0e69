"""Rollouts in a run's folder: what is trained on, to be the same run again, and what
was said, for people.

``rollouts/00000012.npz`` has the arrays of rollout 12: its rows as they are trained on,
and the samples that were under way at its end. ``samples/rollouts.jsonl`` has a line
for each sample.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Protocol

import numpy as np

from maxlm.config import MaxlmError
from maxlm.rl.rollouts.episode import Episode
from maxlm.rl.routes import routes_from_arrays, routes_to_arrays
from maxlm.rl.samples import Prompt, Sample
from maxlm.runtime.collectives import all_gather_json, raise_on_all_hosts
from maxlm.runtime.files import check_run_not_moved, convert_write_errors, replace_file
from maxlm.runtime.json_files import parse_json
from maxlm.runtime.json_types import JsonObject
from maxlm.train.records import read_records

FOLDER = "rollouts"
SAMPLES_FILE = Path("samples") / "rollouts.jsonl"
VALIDATION_FILE = Path("samples") / "validation.jsonl"
"""Has lines of the same form; their ``rollout`` is the step."""
Arrays = Mapping[str, np.ndarray]
_DIGITS = 8
_DIGEST = "sha256"
# Of a member that is encrypted or compressed in a way that there is not.
_ZIP_ERRORS = (zipfile.BadZipFile, RuntimeError, NotImplementedError, struct.error)
# Keys of arrays of samples under way, behind a prefix.
_TOKEN_ARRAYS = ("tokens", "is_sampled", "log_probs", "versions")
_DTYPES = {
    "tokens": np.int32,
    "is_sampled": np.bool_,
    "log_probs": np.float64,
    "versions": np.int32,
}


class PromptReader(Protocol):
    """Reads the prompts of a run, such as
    :class:`~maxlm.rl.rollouts.prompts.PromptOrder`."""

    def take(self, start: int, count: int, /) -> Sequence[Prompt]: ...


@dataclass(frozen=True)
class RolloutFiles:
    """The arrays of a run's rollouts, one file a rollout."""

    folder: Path
    """The run's."""

    def get_path(self, rollout_number: int) -> Path:
        return self.folder / FOLDER / f"{rollout_number:0{_DIGITS}}.npz"

    def write(self, rollout_number: int, arrays: Arrays) -> None:
        """Writes a rollout's arrays: on return they are on the disk, whole. Raises
        MaxlmError: they cannot be written."""
        path = self.get_path(rollout_number)
        with convert_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as temporary, temporary.open("wb") as file:
            members = {**arrays, _DIGEST: _hash_arrays(arrays)}
            np.savez(file, allow_pickle=False, **members)
            file.flush()
            os.fsync(file.fileno())

    def read(self, rollout_number: int) -> dict[str, np.ndarray] | None:
        """Returns a rollout's arrays; None: it was not written. Raises MaxlmError: the
        file is damaged."""
        path = self.get_path(rollout_number)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            # Members have checksums, but their names have none.
            digest = arrays.pop(_DIGEST)
            if not np.array_equal(digest, _hash_arrays(arrays)):
                raise ValueError("it has changed since it was written")
            return arrays
        except FileNotFoundError:
            return None
        # What numpy and zipfile raise of a file that was cut short or changed: any of
        # their checks may be the first that fails.
        except (OSError, ValueError, LookupError, EOFError, *_ZIP_ERRORS) as error:
            message = f"the record of rollout {rollout_number} is damaged: {error}"
            fix = (
                "delete it and all later ones, and resume: they are sampled again, "
                "from the checkpoint's parameters"
            )
            raise MaxlmError(message, where=str(path), fix=fix) from error

    def read_on_all_hosts(self, rollout_number: int) -> dict[str, np.ndarray] | None:
        """The same as :meth:`read`, on all processes together. Raises MaxlmError on all
        of them where they do not read the same: one would draw a rollout, and wait for
        others that have it."""
        arrays = raise_on_all_hosts(lambda: self.read(rollout_number))
        digest = None if arrays is None else _hash_arrays(arrays).tobytes().hex()
        digests = all_gather_json(digest)
        for process, other_digest in enumerate(digests):
            if other_digest != digests[0]:
                message = f"process {process} reads another record of rollout "
                message += f"{rollout_number} than process 0, or none"
                fix = "put the run in a folder that all hosts share"
                where = str(self.get_path(rollout_number))
                raise MaxlmError(message, where=where, fix=fix)
        return arrays

    def list_numbers(self) -> list[int]:
        """Returns the numbers of the rollouts that are there, ascending."""
        paths = (self.folder / FOLDER).glob(f"{'[0-9]' * _DIGITS}*.npz")
        return sorted(int(path.stem) for path in paths if path.stem.isdigit())

    def delete_after(self, rollout_number: int) -> None:
        """Deletes later rollouts, to be sampled again. A run that resumes as it was
        keeps them, and trains on them once more."""
        for number in self.list_numbers():
            if number > rollout_number:
                self.get_path(number).unlink(missing_ok=True)

    def delete_old(self, num_kept: int, first_needed: int) -> None:
        """Deletes all but the newest ``num_kept`` rollouts, and none from
        ``first_needed`` on: the one that training would go on with from the oldest
        checkpoint that it may resume at."""
        numbers = self.list_numbers()
        for number in numbers[: max(0, len(numbers) - num_kept)]:
            if number < first_needed:
                self.get_path(number).unlink(missing_ok=True)


def _hash_arrays(arrays: Arrays) -> np.ndarray:
    """SHA-256 of names, types, shapes and values: uint8 [32]."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def episodes_to_arrays(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Returns arrays from which :func:`episodes_from_arrays` makes samples under way
    once more; their keys begin with ``unfinished_``."""
    samples = [episode.sample for episode in episodes]
    arrays: dict[str, np.ndarray] = {}
    for name in _TOKEN_ARRAYS:
        values = [value for sample in samples for value in getattr(sample, name)]
        arrays[name] = np.array(values, _DTYPES[name])
    lengths = [len(sample.tokens) for sample in samples]
    arrays["lengths"] = np.array(lengths, np.int64)
    states = [
        {
            "prompt_number": episode.sample.prompt.number,
            "number": episode.sample.number,
            "num_prompt_tokens": episode.sample.num_prompt_tokens,
            "turn_start": episode.turn_start,
            "has_ended_turn": episode.has_ended_turn,
            "is_over": episode.is_over,
            "is_complete": episode.sample.is_complete,
            "turns": episode.sample.turns,
        }
        for episode in episodes
    ]
    arrays |= routes_to_arrays(samples)
    arrays["states"] = np.frombuffer(json.dumps(states).encode(), np.uint8)
    return {f"unfinished_{name}": array for name, array in arrays.items()}


def episodes_from_arrays(arrays: Arrays, prompts: PromptReader) -> list[Episode]:
    """Makes samples under way of what :func:`episodes_to_arrays` returned.

    Args:
        prompts: what their prompts are read from.

    Raises:
        MaxlmError: a prompt is other than it was.
    """
    states_json = arrays["unfinished_states"].tobytes()
    states = parse_json(states_json, FOLDER, "delete the record, and resume")
    episodes = []
    routes = routes_from_arrays(arrays, "unfinished_", len(states))
    # Samples of a group have the same prompt.
    known: dict[int, Prompt] = {}
    stop = 0
    for state, length, sample_routes in zip(
        states, arrays["unfinished_lengths"], routes, strict=True
    ):
        start = stop
        stop = start + int(length)
        values = {
            name: arrays[f"unfinished_{name}"][start:stop].tolist()
            for name in _TOKEN_ARRAYS
        }
        prompt_number = state["prompt_number"]
        if prompt_number not in known:
            (known[prompt_number],) = prompts.take(prompt_number, 1)
        prompt = known[prompt_number]
        if list(prompt.tokens) != values["tokens"][: state["num_prompt_tokens"]]:
            message = f"the prompt of row {prompt.row_number} has changed since it was "
            message += "sampled from"
            fix = "put the prompts and the tokenizer back, or begin another run"
            raise MaxlmError(message, where=FOLDER, fix=fix)
        sample = Sample(
            prompt,
            state["number"],
            is_complete=state["is_complete"],
            turns=[(role, text) for role, text in state["turns"]],
            routes=sample_routes,
            **values,
        )
        episode = Episode(
            sample,
            state["turn_start"],
            has_ended_turn=state["has_ended_turn"],
            is_over=state["is_over"],
        )
        episodes.append(episode)
    return episodes


@dataclass(frozen=True)
class ScoredSample:
    """A sample as people read it."""

    sample: Sample
    prompt_text: str
    rewards: Mapping[str, float | None]
    """By name; None: it gave none."""
    reward: float
    advantage: float


class SampleLog:
    """``samples/rollouts.jsonl``: a line for each sample, in the order of training.

    A line has ``step`` (the updates made when its rollout was trained on first),
    ``rollout``, ``row``, ``sample``, ``prompt``, ``turns`` (pairs of role and text),
    ``rewards`` by name, ``reward``, ``advantage``, ``length`` (tokens that the policy
    drew), ``complete`` and ``versions`` (the first and the last).

    A rollout's lines are appended before its arrays are written: so a rollout with
    arrays has its lines. Where it is drawn again, such as after a kill between the two,
    its new lines take the place of the old ones and of those of later steps; those of
    rollouts that a rollback skips give way to the next.

    Args:
        folder: the run's.
        file: of the lines, in the folder.
        write: False on all processes but the first: nothing is written then.
    """

    def __init__(
        self, folder: str | Path, file: Path = SAMPLES_FILE, *, write: bool = True
    ):
        self.path = Path(folder) / file
        self._write = write
        self._next_step = 0
        if not write:
            return
        with convert_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            # A kill may have cut the last line short.
            end_of_whole_lines = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, end_of_whole_lines)
        for record in read_records(self.path):
            self._next_step = max(self._next_step, _get_step(record) + 1)

    def append(
        self, step: int, rollout_number: int, samples: Sequence[ScoredSample]
    ) -> None:
        """Appends a rollout's lines, all or none. Raises MaxlmError: they cannot be
        written."""
        if not self._write:
            return
        if step < self._next_step:
            self._drop_from(step)
        self._next_step = step + 1
        records = [_make_record(step, rollout_number, sample) for sample in samples]
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        with convert_write_errors(self.path):
            check_run_not_moved(self.path)
            size = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    file.write(text.encode())
            except OSError:  # A full disk may have taken the first part.
                os.truncate(self.path, size)
                raise

    def _drop_from(self, step: int) -> None:
        """Drops the lines of a step and later ones, and those that hold no record."""
        with replace_file(self.path) as temporary, temporary.open("w") as file:
            for record in read_records(self.path):
                if _get_step(record) < step:
                    file.write(f"{json.dumps(record)}\n")


def _get_step(record: JsonObject) -> int:
    """The step of a line; -1: it names none."""
    step = record.get("step")
    return step if isinstance(step, int) else -1


def read_sample_log(folder: str | Path) -> Iterator[JsonObject]:
    """Yields the lines of a run's ``samples/rollouts.jsonl``, none if there is none."""
    return read_records(Path(folder) / SAMPLES_FILE)


def _make_record(step: int, rollout_number: int, scored: ScoredSample) -> JsonObject:
    sample = scored.sample
    versions = [version for version in sample.versions if version >= 0]
    rewards = {name: _to_json_number(value) for name, value in scored.rewards.items()}
    return {
        "step": step,
        "rollout": rollout_number,
        "row": sample.prompt.row_number,
        "sample": sample.number,
        "prompt": scored.prompt_text,
        "turns": [list(turn) for turn in sample.turns],
        "rewards": rewards,
        "reward": _to_json_number(scored.reward),
        "advantage": _to_json_number(scored.advantage),
        "length": sample.num_sampled,
        "complete": sample.is_complete,
        "versions": [min(versions, default=-1), max(versions, default=-1)],
    }


def _to_json_number(value: float | None) -> float | None:
    """JSON has neither NaN nor infinity: null."""
    return float(value) if value is not None and isfinite(value) else None
