"""Copies of complete checkpoints in an object store, or another folder.

A copy of step 40 is the files of its folder below ``40/`` and then, written last, ``40/COMPLETE``:
their sizes and SHA-256. What has no such file is no copy yet. Object stores are TensorStore's, with
the credentials and addresses that ``maxlm.runtime.storage`` tells of. Copies are made while
training goes on: one that fails is told of, and the next checkpoint is another try.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.runtime.files import writing
from maxlm.runtime.storage import below, kvstore, remedy, to_place
from maxlm.train.checkpoint.reading import Unreadable, first_line, parse_metadata
from maxlm.train.config import CheckpointConfig

_COMPLETE, _OWNER = "COMPLETE", "OWNER"
_PAUSE = 0.1  # seconds between two looks
_AT_ONCE = 4  # files in memory


class _Stopped(Exception):
    """A copy that nobody waits for any more."""


class RemoteTier:
    """Copies made by one process, one at a time.

    Args:
        place: ``gs://bucket/path``, ``s3://bucket/path`` or a folder; the run's own.
        owner: whose copies these are: the run's folder.

    Raises:
        MaxlmError: it cannot be reached, or holds another owner's copies.
    """

    def __init__(self, place: str, config: CheckpointConfig, owner: str):
        import tensorstore as ts

        self.place = to_place(Path(place).expanduser() if "://" not in place else place)
        self._config = config
        self._thread: threading.Thread | None = None
        self._now: Path | None = None
        self._next: Path | None = None
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self.failure: str | None = None
        """Why the newest copy is not there; None: it is, or is under way."""
        with self._reached():
            ts.KvStore.open(kvstore(self.place, patient=False)).result().list().result()
            self._store = ts.KvStore.open(kvstore(self.place)).result()
            self._claim(owner)
            self._known, cut_short = self._listed()
            for step in cut_short:
                self._clear(step)

    def steps(self) -> list[int]:
        """Steps that were copied completely, oldest first."""
        return list(self._known)

    @property
    def busy(self) -> set[int]:
        """Steps whose folders are being read, or wait to be: they must stay."""
        with self._lock:
            return {int(folder.name) for folder in (self._now, self._next) if folder}

    def copy(self, folder: Path) -> None:
        """Copy a checkpoint's folder once it has its name, which Orbax gives a complete one. While
        one is being copied the newest waits, and others are left out."""
        with self._lock:
            self._next = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def fetch(self, step: int, to: Path) -> None:
        """Copy a step back into the folder ``to``.

        Raises:
            Unreadable: it is not there, or is damaged.
            MaxlmError: ``to`` cannot be written.
        """
        fix = "restore another step"
        where = str(below(self.place, str(step)))
        for name, (size, digest) in self._read(step, _COMPLETE, json.loads).items():
            try:
                value = self._store.read(f"{step}/{name}").result().value
            except ValueError as error:
                raise Unreadable(first_line(error), where=where, fix=fix) from error
            if len(value) != size or hashlib.sha256(value).hexdigest() != digest:
                raise Unreadable(f"unreadable: {name} is damaged", where=where, fix=fix)
            with writing(to):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(value)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the state.

        Raises:
            Unreadable: it is damaged.
        """
        return self._read(step, "metadata/metadata", parse_metadata)

    def forget(self, step: int) -> None:
        """Delete the copy of a step: what makes it complete first."""
        with self._reached():
            self._done(self._store.write(f"{step}/{_COMPLETE}", None))
            self._known = [each for each in self._known if each != step]
            self._clear(step)

    def overlook(self, step: int) -> None:
        """Leave a copy that cannot be read as it is, and do not count it among those kept."""
        self._known = [each for each in self._known if each != step]

    def wait(self) -> None:
        """Return once nothing is being copied any more."""
        while (thread := self._thread) is not None:
            thread.join()

    def stop(self) -> None:
        """Leave off what is being copied. A thread that comes back from TensorStore while the
        interpreter shuts down would abort the process: none is left."""
        with self._lock:
            self._next = None
        self._stopping.set()
        self.wait()
        self._stopping.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._now, self._next = self._next, None
                if self._now is None:
                    self._thread = None
                    return
                folder = self._now
            # Whatever goes wrong, training goes on.
            try:
                if not self._complete(folder):
                    continue
                self._copy(folder)
            except _Stopped:
                continue
            except Exception as error:
                self.failure = first_line(error)
                _tell(f"checkpoint {folder.name} was not copied to {self.place}: {self.failure}")
                continue
            self.failure = None
            try:
                self._prune()
            except _Stopped:
                continue
            except Exception as error:
                _tell(f"older copies were not deleted: {first_line(error)}")

    def _complete(self, folder: Path) -> bool:
        """Wait until a checkpoint has its name; False: another has come in its place."""
        while not folder.is_dir():
            if self._next is not None or self._stopping.is_set():
                return False
            time.sleep(_PAUSE)
        return True

    def _done(self, future: Any) -> Any:
        """A future's result, unless it is waited for no longer."""
        while not self._stopping.is_set():
            if future.done():  # Asked before the wait: it may be so just after one was given up.
                return future.result()
            with suppress(TimeoutError):
                return future.result(timeout=_PAUSE)
        future.cancel()
        raise _Stopped

    def _copy(self, folder: Path) -> None:
        step, written, manifest = int(folder.name), [], {}
        # Of another save of this step.
        self._done(self._store.write(f"{step}/{_COMPLETE}", None))
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, value = path.relative_to(folder).as_posix(), path.read_bytes()
            manifest[name] = [len(value), hashlib.sha256(value).hexdigest()]
            written.append(self._store.write(f"{step}/{name}", value))
            if len(written) >= _AT_ONCE:
                self._done(written.pop(0))
        for each in written:
            self._done(each)
        self._done(self._store.write(f"{step}/{_COMPLETE}", json.dumps(manifest).encode()))
        self._known = sorted({*self._known, step})

    def _prune(self) -> None:
        every = self._config.keep_every
        for old in self._known[: -self._config.keep_last]:
            if every is None or old % every:
                self.forget(old)

    def _clear(self, step: int) -> None:
        import tensorstore as ts

        self._done(self._store.delete_range(ts.KvStore.KeyRange(f"{step}/", f"{step}0")))

    def _claim(self, owner: str) -> None:
        """Runs of one name in two folders would go on from each other's copies, and delete them."""
        found = self._store.read(_OWNER).result()
        if found.state == "missing":
            self._store.write(_OWNER, owner.encode()).result()
        elif (other := found.value.decode(errors="replace")) != owner:
            raise MaxlmError(
                f"holds the copies of the run in {other}, and this one is in {owner}",
                where=str(self.place),
                fix="give this run another name=..., or delete the file OWNER there to take over "
                "what it holds",
            )

    def _listed(self) -> tuple[list[int], list[int]]:
        """Steps that are complete, and those of which only files are there."""
        keys = {key.decode() for key in self._store.list().result()}
        steps = {int(name) for key in keys if (name := key.split("/")[0]).isdigit()}
        if isinstance(self.place, Path):  # A kill leaves temporary files, which are not listed.
            steps |= {int(path.name) for path in self.place.iterdir() if path.name.isdigit()}
        complete = {step for step in steps if f"{step}/{_COMPLETE}" in keys}
        return sorted(complete), sorted(steps - complete)

    def _read(self, step: int, name: str, parse: Callable[[bytes], Any]) -> dict[str, Any]:
        where = str(below(self.place, str(step)))
        try:
            return parse(self._store.read(f"{step}/{name}").result().value)
        except ValueError as error:
            what = f"unreadable ({first_line(error)})"
            raise Unreadable(what, where=where, fix="restore another step") from error

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            fix = remedy(self.place, "name a folder that can be written")
            what = f"cannot be reached ({first_line(error)})"
            raise MaxlmError(what, where=str(self.place), fix=fix) from error


def _tell(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
