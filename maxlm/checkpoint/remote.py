"""Copies of complete checkpoints in an object store, or another folder.

A copy of step 40 is the files of its folder below ``40/`` and then, written last,
``40/COMPLETE``: their sizes. Without this file a copy is incomplete. Object stores are
TensorStore's, with the credentials and addresses that ``maxlm.runtime.storage``
describes. Copies are made while training continues: a failure is reported, and the next
checkpoint is copied again.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TypeVar

import jax
import tensorstore as ts

from maxlm.checkpoint.config import CheckpointConfig
from maxlm.checkpoint.reading import (
    PyTree,
    convert_storage_errors,
    describe_error,
    parse_metadata,
    restore_from,
    with_retries,
)
from maxlm.config import MaxlmError
from maxlm.runtime.collectives import (
    all_gather_json,
    broadcast_from_process_0,
    run_on_process_0,
)
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.json_types import JsonObject
from maxlm.runtime.storage import (
    get_read_failure_fix,
    join_place,
    make_kvstore_spec,
    to_place,
)

ResultT = TypeVar("ResultT")

_FETCHED = ".fetched"
_COMPLETE = "COMPLETE"
_OWNER = "OWNER"
_POLL_SECONDS = 0.1
_FILES_IN_MEMORY = 4


class _Cancelled(BaseException):
    """A copy that nobody waits for any more."""


class RemoteTier:
    """Copies of a folder's checkpoints. All processes call every method together;
    process 0 makes the copies, one at a time, in a thread. ``place``:
    ``gs://bucket/path``, ``s3://bucket/path`` or a folder; the run's own. ``folder``:
    that is copied, and that copies are fetched into; it also names their owner."""

    name = "remote"

    def __init__(self, place: str, config: CheckpointConfig, folder: Path):
        self.place = place
        self._folder = folder
        self._config = config
        self._place = to_place(place if "://" in place else Path(place).expanduser())
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._copies: dict[int, Future[None]] = {}
        self._newest = -1
        self._cancelling = threading.Event()
        self._complete_steps: list[int] = []
        self.failure: str | None = None
        """Why the newest copy is missing, on process 0; None: it is there, or under
        way."""
        self._is_lead = jax.process_index() == 0
        run_on_process_0(self._open)

    def _open(self) -> None:
        shutil.rmtree(self._folder / _FETCHED, ignore_errors=True)  # left by a kill
        with self._explain():
            probe = make_kvstore_spec(self._place, long_retries=False)
            ts.KvStore.open(probe).result().list().result()
            self._store = ts.KvStore.open(make_kvstore_spec(self._place)).result()
            self._claim()
            keys = {key.decode() for key in self._store.list().result()}
            names = {key.split("/")[0] for key in keys}
            if isinstance(self._place, Path):
                # A kill leaves temporary files, which are not keys.
                names |= {path.name for path in self._place.iterdir()}
            steps = [int(name) for name in names if name.isdigit()]
            for step in sorted(steps):
                if f"{step}/{_COMPLETE}" in keys:
                    self._complete_steps.append(step)
                else:
                    self._clear(step)

    def _claim(self) -> None:
        """Refuses a place of another run, of the same name in another folder."""
        owner = str(self._folder)
        stored = self._store.read(_OWNER).result()
        if stored.state == "missing":
            self._store.write(_OWNER, owner.encode()).result()
            return
        stored_owner = stored.value.decode(errors="replace")
        if stored_owner != owner:
            raise MaxlmError(
                f"holds the copies of the run in {stored_owner}, and this one is in "
                f"{owner}",
                where=str(self._place),
                fix="give this run another name=..., or delete the file OWNER there to "
                "take over what it holds",
            )

    @property
    def steps_being_copied(self) -> list[int]:
        """Steps whose folders are being read, or wait to be: they must stay."""
        return [step for step, copy in list(self._copies.items()) if not copy.done()]

    def start_copy(self, step: int) -> None:
        """Copies a checkpoint from the folder once it is complete there. While one is
        being copied the newest waits, and others are left out."""
        if self._is_lead:
            self._newest = step
            for copy in self._copies.values():
                copy.cancel()  # unless it has begun
            self._copies = {
                step: copy for step, copy in self._copies.items() if not copy.done()
            }
            self._copies[step] = self._thread.submit(self._try_copy, step)

    def steps(self) -> list[int]:
        """Returns the steps that were copied completely, oldest first."""
        return broadcast_from_process_0(self._complete_steps)

    def metadata(self, step: int) -> JsonObject:
        """Returns what was saved beside the state; raises UnreadableCheckpoint."""
        place = join_place(self._place, str(step))

        def read() -> JsonObject:
            return parse_metadata(self._read(step, "metadata/metadata"))

        return run_on_process_0(lambda: with_retries(place, read))

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """Returns the state; its files are fetched to where all processes read them."""
        path = self._folder / _FETCHED / str(step)
        run_on_process_0(lambda: self._fetch(step, path))
        try:
            return restore_from(path, abstract)
        finally:
            all_gather_json(None)  # all have read it
            if self._is_lead:
                shutil.rmtree(path.parent, ignore_errors=True)

    def _fetch(self, step: int, to: Path) -> None:
        place = join_place(self._place, str(step))

        def copy_back() -> None:
            for name in json.loads(self._read(step, _COMPLETE)):
                value = self._read(step, name)
                with convert_write_errors(to):  # a full disk makes no copy unreadable
                    (to / name).parent.mkdir(parents=True, exist_ok=True)
                    (to / name).write_bytes(value)

        shutil.rmtree(to.parent, ignore_errors=True)
        with_retries(place, copy_back)

    def _read(self, step: int, name: str) -> bytes:
        """Returns a file of a copy, empty if it is missing; patient with the store."""
        return self._store.read(f"{step}/{name}").result().value

    def discard_skipped(
        self, is_damaged_by_step: Mapping[int, bool], resume_step: int
    ) -> None:
        """Ignores damaged copies, which may be readable another day, and deletes
        others."""
        if not self._is_lead:
            return
        for step, is_damaged in is_damaged_by_step.items():
            if is_damaged:
                self._complete_steps.remove(step)
            else:
                self._delete(step)

    def wait(self) -> None:
        """Waits until nothing is being copied."""
        wait(self._copies.values())

    def close(self) -> None:
        """Cancels what is being copied. A thread that returns from TensorStore while
        the interpreter shuts down would abort the process: none is left."""
        self._cancelling.set()
        self.wait()
        self._cancelling.clear()

    def _try_copy(self, step: int) -> None:
        """Copies a checkpoint and deletes old copies. Training continues whatever
        fails."""
        message = f"checkpoint {step} was not copied to {self._place}"
        try:
            self._copy(step)
            self.failure = None
            message = "older copies were not deleted"
            every = self._config.keep_every
            for old_step in self._complete_steps[: -self._config.keep_last]:
                if every is None or old_step % every:
                    self._delete(old_step)
        except _Cancelled:
            pass
        except Exception as error:
            # Stores raise what they like, and nobody waits for this thread's error.
            if step not in self._complete_steps:
                self.failure = describe_error(error)
            print(f"{message}: {describe_error(error)}", file=sys.stderr, flush=True)

    def _await(self, future: "ts.Future[ResultT]") -> ResultT:
        """Returns a future's result, unless copies are cancelled."""
        while not self._cancelling.is_set():
            # Looked at before the wait: it may be done just after one timed out.
            if future.done():
                return future.result()
            with suppress(TimeoutError):
                return future.result(timeout=_POLL_SECONDS)
        future.cancel()
        raise _Cancelled

    def _copy(self, step: int) -> None:
        folder = self._folder / str(step)
        writes = []
        sizes = {}
        while not folder.is_dir():  # Orbax gives a complete one its name.
            if self._cancelling.is_set() or self._newest != step:
                raise _Cancelled
            time.sleep(_POLL_SECONDS)
        self._invalidate(step)  # another save of this step
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            value = path.read_bytes()
            sizes[name] = len(value)
            writes.append(self._store.write(f"{step}/{name}", value))
            if len(writes) >= _FILES_IN_MEMORY:
                self._await(writes.pop(0))
        for write in writes:
            self._await(write)
        self._await(
            self._store.write(f"{step}/{_COMPLETE}", json.dumps(sizes).encode())
        )
        self._complete_steps = sorted({*self._complete_steps, step})

    def _delete(self, step: int) -> None:
        with self._explain():
            self._invalidate(step)
            self._clear(step)

    def _invalidate(self, step: int) -> None:
        self._await(self._store.write(f"{step}/{_COMPLETE}", None))
        self._complete_steps = [
            complete_step
            for complete_step in self._complete_steps
            if complete_step != step
        ]

    def _clear(self, step: int) -> None:
        # "0" is the character after "/": the range has all keys below the step's folder.
        keys = ts.KvStore.KeyRange(f"{step}/", f"{step}0")
        self._await(self._store.delete_range(keys))

    def _explain(self) -> AbstractContextManager[None]:
        fix = get_read_failure_fix(self._place, "name a folder that can be written")
        return convert_storage_errors("cannot be reached", self._place, fix)
