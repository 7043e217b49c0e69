"""Rollouts in a run's folder: what is trained on, to be the same run again, and what
was said, for people.

``rollouts/00000012.npz`` has the arrays of rollout 12: its rows as they are trained on,
and the samples that were under way at its end. ``samples/rollouts.jsonl`` has a line
for each sample.
"""

import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Protocol

import numpy as np

from maxlm.config import MaxlmError
from maxlm.rl.rollouts.episode import Episode
from maxlm.rl.samples import Prompt, Sample
from maxlm.runtime.files import convert_write_errors, replace_file
from maxlm.runtime.json_files import parse_json
from maxlm.runtime.json_types import JsonObject
from maxlm.train.records import read_records

FOLDER = "rollouts"
SAMPLES_FILE = Path("samples") / "rollouts.jsonl"
Arrays = Mapping[str, np.ndarray]
_DIGITS = 8
# Keys of arrays of samples under way, behind a prefix.
_TOKEN_ARRAYS = ("tokens", "is_sampled", "log_probs", "versions")
_DTYPES = {
    "tokens": np.int32,
    "is_sampled": np.bool_,
    "log_probs": np.float64,
    "versions": np.int32,
}


class RowReader(Protocol):
    """Reads the prompt of a row, such as :class:`PromptOrder`."""

    def read_row(self, row_number: int, /) -> Prompt: ...


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
            np.savez(file, **dict(arrays))  # pyright: ignore[reportArgumentType]
            file.flush()
            os.fsync(file.fileno())

    def read(self, rollout_number: int) -> dict[str, np.ndarray] | None:
        """Returns a rollout's arrays; None: it was not written. Raises MaxlmError: the
        file is damaged."""
        path = self.get_path(rollout_number)
        try:
            # Every member has a checksum, which reading it checks.
            with np.load(path, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None
        # What numpy raises of a file that was cut short or changed.
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            message = f"the record of rollout {rollout_number} is damaged: {error}"
            fix = (
                "delete it and all later ones, and resume: they are sampled again, "
                "from the checkpoint's parameters"
            )
            raise MaxlmError(message, where=str(path), fix=fix) from error

    def list_numbers(self) -> list[int]:
        """Returns the numbers of the rollouts that are there, ascending."""
        paths = (self.folder / FOLDER).glob(f"{'[0-9]' * _DIGITS}*.npz")
        return sorted(int(path.stem) for path in paths if path.stem.isdigit())

    def delete_after(self, rollout_number: int) -> None:
        """Deletes later rollouts: training goes on from there once more, with other
        settings. A run that resumes as it was keeps them, and trains on them again."""
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
            "row_number": episode.sample.prompt.row_number,
            "number": episode.sample.number,
            "rollout_number": episode.rollout_number,
            "occurrence": episode.occurrence,
            "num_prompt_tokens": episode.sample.num_prompt_tokens,
            "turn_start": episode.turn_start,
            "has_ended_turn": episode.has_ended_turn,
            "is_over": episode.is_over,
            "is_complete": episode.sample.is_complete,
            "turns": episode.sample.turns,
        }
        for episode in episodes
    ]
    arrays["states"] = np.frombuffer(json.dumps(states).encode(), np.uint8)
    return {f"unfinished_{name}": array for name, array in arrays.items()}


def episodes_from_arrays(arrays: Arrays, rows: RowReader) -> list[Episode]:
    """Makes samples under way of what :func:`episodes_to_arrays` returned.

    Args:
        rows: what the rows of their prompts are read from.

    Raises:
        MaxlmError: a prompt is other than it was.
    """
    states_json = arrays["unfinished_states"].tobytes()
    states = parse_json(states_json, FOLDER, "delete the record, and resume")
    episodes = []
    stop = 0
    for state, length in zip(states, arrays["unfinished_lengths"], strict=True):
        start = stop
        stop = start + int(length)
        values = {
            name: arrays[f"unfinished_{name}"][start:stop].tolist()
            for name in _TOKEN_ARRAYS
        }
        prompt = rows.read_row(state["row_number"])
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
            **values,
        )
        episode = Episode(
            sample,
            state["rollout_number"],
            state["occurrence"],
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

    Args:
        folder: the run's.
        resume_step: lines of later steps are dropped; None: none are.
        write: False on all processes but the first: nothing is written then.
    """

    def __init__(
        self, folder: str | Path, resume_step: int | None = None, *, write: bool = True
    ):
        self.path = Path(folder) / SAMPLES_FILE
        self._write = write
        if not write:
            return
        with convert_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            # A kill may have cut the last line short.
            end_of_whole_lines = self.path.read_bytes().rfind(b"\n") + 1
            os.truncate(self.path, end_of_whole_lines)
        if resume_step is not None:
            self.rewind(resume_step)

    def rewind(self, step: int) -> None:
        """Drops every line whose ``step`` is later, and lines that hold no record."""
        if not self._write:
            return
        with replace_file(self.path) as temporary, temporary.open("w") as file:
            for record in read_records(self.path):
                if record["step"] <= step:
                    file.write(f"{json.dumps(record)}\n")

    def append(
        self, step: int, rollout_number: int, samples: Sequence[ScoredSample]
    ) -> None:
        """Appends lines, all or none. Raises MaxlmError: they cannot be written."""
        if not self._write:
            return
        records = [_make_record(step, rollout_number, sample) for sample in samples]
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        with convert_write_errors(self.path):
            size = self.path.stat().st_size
            try:
                with self.path.open("ab") as file:
                    file.write(text.encode())
            except OSError:  # A full disk may have taken the first part.
                os.truncate(self.path, size)
                raise


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
