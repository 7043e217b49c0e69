"""Copies of complete checkpoints in an object store, or another folder.

A copy of step 40 is the files of its folder below ``40/`` and then, written last, ``40/COMPLETE``:
their sizes and SHA-256. Without this file a copy is incomplete. Object stores are TensorStore's,
with the credentials and addresses that ``maxlm.runtime.storage`` describes. Copies are made while
training continues: a failure is reported, and the next checkpoint is copied again.
"""

import hashlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.runtime.collectives import all_gather_json, broadcast_from_process_0, raise_on_all_hosts
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.storage import join_place, make_kvstore_spec, read_failure_hint, to_place
from maxlm.train.checkpoint.reading import (
    PyTree,
    Unreadable,
    describe_error,
    parse_metadata,
    restore_from,
)
from maxlm.train.config import CheckpointConfig
from maxlm.train.grouped import Groups

FETCHED = ".fetched"
_COMPLETE, _OWNER = "COMPLETE", "OWNER"
_POLL_SECONDS = 0.1
_FILES_IN_MEMORY = 4


class RemoteTier:
    """Copies of a folder's checkpoints. All processes call every method together; process 0 makes
    the copies, one at a time.

    Args:
        place: ``gs://bucket/path``, ``s3://bucket/path`` or a folder; the run's own.
        folder: that is copied, and that copies are fetched into; it also names their owner.

    Raises:
        MaxlmError: the place cannot be reached, or holds another run's copies.
    """

    name = "remote"

    def __init__(
        self, place: str, config: CheckpointConfig, folder: Path, grouped: Groups | None = None
    ):
        self.place, self._folder, self._groups = place, folder, grouped or {}
        lead = jax.process_index() == 0
        self._copier = raise_on_all_hosts(
            lambda: _Copier(place, config, str(folder)) if lead else None
        )

    @property
    def busy_steps(self) -> set[int]:
        """Steps whose folders are being read, or wait to be: they must stay."""
        return self._copier.busy_steps if self._copier else set()

    def save(
        self, step: int, state: PyTree = None, metadata: Mapping[str, Any] | None = None
    ) -> bool:
        """Copies a checkpoint from the folder once it is complete there."""
        if self._copier:
            self._copier.copy(self._folder / str(step))
        return True

    def steps(self) -> list[int]:
        """Returns the steps that were copied completely, oldest first."""
        return broadcast_from_process_0(self._copier and list(self._copier.complete_steps))

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state; raises Unreadable."""
        copier = self._copier
        return broadcast_from_process_0(
            raise_on_all_hosts(lambda: copier and copier.read_metadata(step))
        )

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """Returns the state; its files are fetched to where all processes read them."""
        path, copier = self._folder / FETCHED / str(step), self._copier

        def fetch() -> None:
            if copier:
                shutil.rmtree(path.parent, ignore_errors=True)
                copier.fetch(step, path)

        raise_on_all_hosts(fetch)
        try:
            return restore_from(path, abstract, self._groups)
        finally:
            all_gather_json(None)  # all have read it
            if copier:
                shutil.rmtree(path.parent, ignore_errors=True)

    def quarantine(self, steps: Mapping[int, bool], resume_step: int) -> None:
        """Ignores damaged copies, which may be readable another day, and deletes others."""
        if copier := self._copier:
            for step, is_damaged in steps.items():
                (copier.ignore if is_damaged else copier.delete)(step)

    def wait(self) -> None:
        """Waits until nothing is being copied."""
        if self._copier:
            self._copier.wait()

    def wait_for_copies(self) -> str | None:
        """Waits for copies; returns, on process 0, why the newest one failed."""
        self.wait()
        return self._copier and self._copier.failure

    def close(self) -> None:
        """Cancels what is being copied."""
        if self._copier:
            self._copier.cancel()


class _Cancelled(Exception):
    """A copy that nobody waits for any more."""


class _Copier:
    """The copies as process 0 makes and reads them, in a thread."""

    def __init__(self, place: str, config: CheckpointConfig, owner: str):
        import tensorstore as ts

        self._place = to_place(Path(place).expanduser() if "://" not in place else place)
        self._config = config
        self._thread: threading.Thread | None = None
        self._current: Path | None = None
        self._next: Path | None = None
        self._lock, self._cancelling = threading.Lock(), threading.Event()
        self.failure: str | None = None
        """Why the newest copy is missing; None: it is there, or under way."""
        with self._explain():
            ts.KvStore.open(make_kvstore_spec(self._place, patient=False)).result().list().result()
            self._store = ts.KvStore.open(make_kvstore_spec(self._place)).result()
            self._claim(owner)
            self.complete_steps, incomplete = self._list()
            for step in incomplete:
                self._clear(step)

    @property
    def busy_steps(self) -> set[int]:
        with self._lock:
            return {int(folder.name) for folder in (self._current, self._next) if folder}

    def copy(self, folder: Path) -> None:
        """Copies a checkpoint's folder once it has its name, which Orbax gives a complete one.
        While one is being copied the newest waits, and others are left out."""
        with self._lock:
            self._next = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()

    def fetch(self, step: int, to: Path) -> None:
        """Copies a step back into the folder ``to``.

        Raises:
            Unreadable: it is not there, or is damaged.
            MaxlmError: ``to`` cannot be written.
        """
        for name, (size, digest) in self._read(step, _COMPLETE, json.loads).items():
            value = self._read(step, name, bytes)
            if len(value) != size or hashlib.sha256(value).hexdigest() != digest:
                where, fix = str(join_place(self._place, str(step))), "restore another step"
                raise Unreadable(f"unreadable: {name} is damaged", where=where, fix=fix)
            with convert_write_errors(to):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(value)

    def read_metadata(self, step: int) -> dict[str, Any]:
        return self._read(step, "metadata/metadata", parse_metadata)

    def delete(self, step: int) -> None:
        """Deletes the copy of a step: what makes it complete first."""
        with self._explain():
            self._await(self._store.write(f"{step}/{_COMPLETE}", None))
            self.ignore(step)
            self._clear(step)

    def ignore(self, step: int) -> None:
        """Leaves a copy as it is, and does not count it among those kept."""
        self.complete_steps = [each for each in self.complete_steps if each != step]

    def wait(self) -> None:
        while (thread := self._thread) is not None:
            thread.join()

    def cancel(self) -> None:
        """Cancels what is being copied. A thread that returns from TensorStore while the
        interpreter shuts down would abort the process: none is left."""
        with self._lock:
            self._next = None
        self._cancelling.set()
        self.wait()
        self._cancelling.clear()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._current, self._next = self._next, None
                if self._current is None:
                    self._thread = None
                    return
                folder = self._current
            with suppress(_Cancelled):
                if self._wait_for_checkpoint(folder):
                    self._try_copy(folder)

    def _wait_for_checkpoint(self, folder: Path) -> bool:
        """Waits until a checkpoint has its name; False: another has come in its place."""
        while not folder.is_dir():
            if self._next is not None or self._cancelling.is_set():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _try_copy(self, folder: Path) -> None:
        """Copies a checkpoint and deletes old copies. Training continues whatever fails."""
        what = f"checkpoint {folder.name} was not copied to {self._place}"
        try:
            self._copy(folder)
            self.failure, what = None, "older copies were not deleted"
            every = self._config.keep_every
            for old in self.complete_steps[: -self._config.keep_last]:
                if every is None or old % every:
                    self.delete(old)
        except _Cancelled:
            raise
        except Exception as error:
            if folder.name in what:
                self.failure = describe_error(error)
            print(f"{what}: {describe_error(error)}", file=sys.stderr, flush=True)

    def _await(self, future: Any) -> Any:
        """Returns a future's result, unless copies are cancelled."""
        while not self._cancelling.is_set():
            if future.done():  # Asked before the wait: it may be so just after one timed out.
                return future.result()
            with suppress(TimeoutError):
                return future.result(timeout=_POLL_SECONDS)
        future.cancel()
        raise _Cancelled

    def _copy(self, folder: Path) -> None:
        step, writes, manifest = int(folder.name), [], {}
        # Of another save of this step.
        self._await(self._store.write(f"{step}/{_COMPLETE}", None))
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, value = path.relative_to(folder).as_posix(), path.read_bytes()
            manifest[name] = [len(value), hashlib.sha256(value).hexdigest()]
            writes.append(self._store.write(f"{step}/{name}", value))
            if len(writes) >= _FILES_IN_MEMORY:
                self._await(writes.pop(0))
        for each in writes:
            self._await(each)
        self._await(self._store.write(f"{step}/{_COMPLETE}", json.dumps(manifest).encode()))
        self.complete_steps = sorted({*self.complete_steps, step})

    def _clear(self, step: int) -> None:
        import tensorstore as ts

        self._await(self._store.delete_range(ts.KvStore.KeyRange(f"{step}/", f"{step}0")))

    def _claim(self, owner: str) -> None:
        """Refuses a place of another run, of the same name in another folder."""
        found = self._store.read(_OWNER).result()
        if found.state == "missing":
            self._store.write(_OWNER, owner.encode()).result()
        elif (other := found.value.decode(errors="replace")) != owner:
            raise MaxlmError(
                f"holds the copies of the run in {other}, and this one is in {owner}",
                where=str(self._place),
                fix="give this run another name=..., or delete the file OWNER there to take over "
                "what it holds",
            )

    def _list(self) -> tuple[list[int], list[int]]:
        """Lists the steps that are complete, and those of which only files are there."""
        keys = {key.decode() for key in self._store.list().result()}
        steps = {int(name) for key in keys if (name := key.split("/")[0]).isdigit()}
        if isinstance(self._place, Path):  # A kill leaves temporary files, which are not listed.
            steps |= {int(path.name) for path in self._place.iterdir() if path.name.isdigit()}
        complete = {step for step in steps if f"{step}/{_COMPLETE}" in keys}
        return sorted(complete), sorted(steps - complete)

    def _read(self, step: int, name: str, parse: Callable[[bytes], Any]) -> Any:
        try:
            return parse(self._store.read(f"{step}/{name}").result().value)
        except ValueError as error:
            where, what = (
                str(join_place(self._place, str(step))),
                f"unreadable ({describe_error(error)})",
            )
            raise Unreadable(what, where=where, fix="restore another step") from error

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            fix = read_failure_hint(self._place, "name a folder that can be written")
            what = f"cannot be reached ({describe_error(error)})"
            raise MaxlmError(what, where=str(self._place), fix=fix) from error
