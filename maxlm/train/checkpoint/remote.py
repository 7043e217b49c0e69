"""Copies of complete checkpoints in an object store, or another folder.

A copy of step 40 is the files of its folder below ``40/`` and then, written last, ``40/COMPLETE``:
their sizes and SHA-256. What has no such file is no copy yet. Object stores are TensorStore's, with
the credentials and addresses that ``maxlm.data.store.places`` tells of.
"""

import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maxlm.config import MaxlmError
from maxlm.data.store.places import below, kvstore, remedy, to_place
from maxlm.train.checkpoint.reading import Unreadable, first_line
from maxlm.train.config import CheckpointConfig

_COMPLETE = "COMPLETE"
_PAUSE = 0.1  # seconds between two looks


class RemoteTier:
    """Copies made by one process, one at a time, while training goes on.

    Args:
        place: ``gs://bucket/path``, ``s3://bucket/path`` or a folder; the run's own.

    Raises:
        MaxlmError: it cannot be reached.
    """

    def __init__(self, place: str, config: CheckpointConfig):
        import tensorstore as ts

        self.place = to_place(Path(place).expanduser() if "://" not in place else place)
        self._config = config
        self._thread: threading.Thread | None = None
        self._next: Path | None = None
        self._lock = threading.Lock()
        self._failed: str | None = None
        self._known: list[int] = []
        with self._reached():
            self._store = ts.KvStore.open(kvstore(self.place, patient=False)).result()
            self._known = self._listed()

    def steps(self) -> list[int]:
        """Steps that were copied completely, oldest first."""
        return list(self._known)

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
        from maxlm.data.work.paths import writing

        fix = "restore another step"
        where = str(below(self.place, str(step)))
        for name, (size, digest) in self._json(step, _COMPLETE).items():
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
        return self._json(step, "metadata/metadata")

    def forget(self, step: int) -> None:
        """Delete the copy of a step: what makes it complete first."""
        import tensorstore as ts

        with self._reached():
            self._store.write(f"{step}/{_COMPLETE}", None).result()
            self._store.delete_range(ts.KvStore.KeyRange(f"{step}/", f"{step}0")).result()
        self._known = [each for each in self._known if each != step]

    def wait(self) -> None:
        """Return once nothing is being copied any more.

        Raises:
            MaxlmError: the newest checkpoint could not be copied.
        """
        while (thread := self._thread) is not None:
            thread.join()
        if self._failed is not None:
            what, self._failed = self._failed, None
            fix = remedy(self.place, "free some space or rights there, resume")
            raise MaxlmError(
                f"a checkpoint was not copied ({what})", where=str(self.place), fix=fix
            )

    def _work(self) -> None:
        while True:
            with self._lock:
                folder, self._next = self._next, None
                if folder is None:
                    self._thread = None
                    return
            try:
                self._copy(folder)
                self._failed = None
            except (ValueError, OSError, MaxlmError) as error:
                self._failed = first_line(error)
                # Training goes on: the next checkpoint is another try.
                print(
                    f"checkpoint {folder.name} was not copied to {self.place}: {self._failed}",
                    file=sys.stderr,
                    flush=True,
                )

    def _copy(self, folder: Path) -> None:
        while not folder.is_dir():
            time.sleep(_PAUSE)
        step, written, manifest = int(folder.name), [], {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, value = path.relative_to(folder).as_posix(), path.read_bytes()
            manifest[name] = [len(value), hashlib.sha256(value).hexdigest()]
            written.append(self._store.write(f"{step}/{name}", value))
            if len(written) >= 8:  # in memory at once
                written.pop(0).result()
        for each in written:
            each.result()
        self._store.write(f"{step}/{_COMPLETE}", json.dumps(manifest).encode()).result()
        self._known = sorted({*self._known, step})
        every = self._config.keep_every
        for old in self._known[: -self._config.keep_last]:
            if every is None or old % every:
                self.forget(old)

    def _listed(self) -> list[int]:
        end = f"/{_COMPLETE}"
        names = (key.decode() for key in self._store.list().result())
        steps = (name.removesuffix(end) for name in names if name.endswith(end))
        return sorted(int(step) for step in steps if step.isdigit())

    def _json(self, step: int, name: str) -> dict[str, Any]:
        where = str(below(self.place, str(step)))
        try:
            return json.loads(self._store.read(f"{step}/{name}").result().value)
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
