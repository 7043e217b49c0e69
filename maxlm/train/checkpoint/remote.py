"""Copies of complete checkpoints in an object store, or another folder.

A copy of step 40 is the files of its folder below ``40/`` and then, written last, ``40/COMPLETE``:
their sizes. Without this file a copy is incomplete. Object stores are TensorStore's, with the
credentials and addresses that ``maxlm.runtime.storage`` describes. Copies are made while training
continues: a failure is reported, and the next checkpoint is copied again.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from maxlm.config import MaxlmError
from maxlm.runtime.collectives import all_gather_json, broadcast_from_process_0, raise_on_all_hosts
from maxlm.runtime.storage import (
    make_kvstore_spec,
    read_failure_hint,
    read_file,
    to_place,
)
from maxlm.train.checkpoint.reading import (
    PyTree,
    describe_error,
    parse_metadata,
    restore_from,
    with_retries,
)
from maxlm.train.config import CheckpointConfig

_FETCHED, _COMPLETE, _OWNER = ".fetched", "COMPLETE", "OWNER"
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

    def __init__(self, place: str, config: CheckpointConfig, folder: Path):
        self.place, self._folder = place, folder

        def open_copier() -> _Copier | None:
            if jax.process_index() > 0:
                return None
            shutil.rmtree(folder / _FETCHED, ignore_errors=True)  # left by a kill
            return _Copier(place, config, str(folder))

        self._copier = raise_on_all_hosts(open_copier)

    @property
    def busy_steps(self) -> set[int]:
        """Steps whose folders are being read, or wait to be: they must stay."""
        return self._copier.busy_steps if self._copier else set()

    def save(
        self, step: int, state: PyTree = None, metadata: Mapping[str, Any] | None = None
    ) -> bool:
        """Copies a checkpoint from the folder once it is complete there."""
        if self._copier:
            self._copier.start_copy(self._folder / str(step))
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
        path, copier = self._folder / _FETCHED / str(step), self._copier
        raise_on_all_hosts(lambda: copier and copier.fetch(step, path))
        try:
            return restore_from(path, abstract)
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

    @property
    def failure(self) -> str | None:
        """Why the newest copy is missing, on process 0; None: it is there, or under way."""
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
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._copies: dict[int, Future[None]] = {}
        self._newest: Path | None = None
        self._cancelling = threading.Event()
        self.failure: str | None = None
        with self._explain():
            ts.KvStore.open(make_kvstore_spec(self._place, patient=False)).result().list().result()
            self._store = ts.KvStore.open(make_kvstore_spec(self._place)).result()
            self._claim(owner)
            self.complete_steps, incomplete = self._list()
            for step in incomplete:
                self._clear(step)

    @property
    def busy_steps(self) -> set[int]:
        return {step for step, copy in list(self._copies.items()) if not copy.done()}

    def start_copy(self, folder: Path) -> None:
        """Copies a checkpoint's folder once it has its name, which Orbax gives a complete one.
        While one is being copied the newest waits, and others are left out."""
        self._newest = folder
        for copy in self._copies.values():
            copy.cancel()  # unless it has begun
        self._copies = {step: copy for step, copy in self._copies.items() if not copy.done()}
        self._copies[int(folder.name)] = self._thread.submit(self._try_copy, folder)

    def fetch(self, step: int, to: Path) -> None:
        """Copies a step back into the folder ``to``; raises Unreadable."""

        def copy_back() -> None:
            for name in json.loads(read_file(self._place, f"{step}/{_COMPLETE}")):
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(read_file(self._place, f"{step}/{name}"))

        shutil.rmtree(to.parent, ignore_errors=True)
        with_retries(self._place, copy_back)

    def read_metadata(self, step: int) -> dict[str, Any]:
        name = f"{step}/metadata/metadata"
        return with_retries(self._place, lambda: parse_metadata(read_file(self._place, name)))

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
        wait(self._copies.values())

    def cancel(self) -> None:
        """Cancels what is being copied. A thread that returns from TensorStore while the
        interpreter shuts down would abort the process: none is left."""
        self._cancelling.set()
        self.wait()
        self._cancelling.clear()

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
            pass
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
        step, writes, sizes = int(folder.name), [], {}
        while not folder.is_dir():
            if self._cancelling.is_set() or self._newest != folder:  # Another is in its place.
                raise _Cancelled
            time.sleep(_POLL_SECONDS)
        # Of another save of this step.
        self._await(self._store.write(f"{step}/{_COMPLETE}", None))
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, value = path.relative_to(folder).as_posix(), path.read_bytes()
            sizes[name] = len(value)
            writes.append(self._store.write(f"{step}/{name}", value))
            if len(writes) >= _FILES_IN_MEMORY:
                self._await(writes.pop(0))
        for each in writes:
            self._await(each)
        self._await(self._store.write(f"{step}/{_COMPLETE}", json.dumps(sizes).encode()))
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

    @contextmanager
    def _explain(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            fix = read_failure_hint(self._place, "name a folder that can be written")
            what = f"cannot be reached ({describe_error(error)})"
            raise MaxlmError(what, where=str(self._place), fix=fix) from error
