"""Runs tasks on a Ray cluster, which places them and runs those again that died."""

import itertools
import logging
import os
import pickle
import re
import socket
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from maxlm.config import MaxlmError
from maxlm.runtime.files import convert_write_errors
from maxlm.runtime.pool import run_pickled, use_one_tokenizer_thread

if TYPE_CHECKING:
    import ray

Job = TypeVar("Job")
Result = TypeVar("Result")

_CLIENT_PORT = 10001  # The one that `ray start --head` opens for ray:// addresses.
_SECONDS_TO_CONNECT = 10
_SECONDS_TO_CANCEL = 30


@dataclass(frozen=True)
class _Workspace:
    """The place that tasks work in, as every worker must find it."""

    working_folder: str
    """The folder that relative paths start from."""
    marker: str | None
    """A file of a new name in the folder that workers share."""
    versions: tuple[tuple[str, str], ...]
    """The versions of packages: other ones may write other bytes."""


class RayExecutor(AbstractContextManager["RayExecutor"]):
    """Runs tasks on a Ray cluster; use as a context manager.

    Ray runs a task again whose process or machine died, three times if need be. That
    does no harm, also where the first one lives on unseen: see `maxlm.runtime.executor`
    about files.

    Every machine of the cluster needs the current folder under the same path, and the
    same version of maxlm; each worker checks that, and `require_on_workers`, with its
    first task.
    """

    def __init__(self, address: str | None, workers: int | None = None):
        """
        Args:
            address: "ray://HOST:PORT", of the Ray client server on a cluster's head
                node. None: the cluster that this process is connected to; else that of
                RAY_ADDRESS or, without it, the one that runs on this machine; else one
                that starts here and ends with this context.
            workers: tasks at a time, at most; None: as many as the cluster has CPUs,
                which are counted again as machines come and go.
        """
        self._address = address
        self._workers = workers
        self._is_connected_here = False
        self._workspace = _make_workspace(None, ())

    def __enter__(self) -> "RayExecutor":
        """Raises: MaxlmError: Ray is not installed, or no cluster can be reached."""
        try:
            import ray

            if self._address is not None:
                # Ray's client needs it, and would fail with a traceback.
                import grpc  # noqa: F401
        except ImportError as error:
            message = (
                f"{error.name or error} is not installed, which a Ray cluster needs"
            )
            fix = "pip install 'maxlm[ray]'"
            raise MaxlmError(message, where="--on", fix=fix) from error
        if self._address is not None or not ray.is_initialized():
            _connect(self._address)
            self._is_connected_here = True
        return self

    def __exit__(self, kind, value, trace) -> None:
        import ray

        self._remove_marker()
        if self._is_connected_here:
            ray.shutdown()

    def require_on_workers(self, shared_folder: Path, packages: Sequence[str]) -> None:
        """See `TaskExecutor`. A file of a new name lies in the folder until this
        context ends."""
        self._remove_marker()
        folder = shared_folder.expanduser().absolute()
        # The marker of a killed command stays, an empty file: it might be of one that
        # still runs.
        marker = folder / f".ray-{uuid.uuid4().hex}"
        with convert_write_errors(marker):
            marker.touch()
        self._workspace = _make_workspace(marker, packages)

    def _remove_marker(self) -> None:
        if self._workspace.marker is not None:
            Path(self._workspace.marker).unlink(missing_ok=True)
            self._workspace = _make_workspace(None, ())

    def map_unordered(
        self, function: Callable[[Job], Result], jobs: Sequence[Job]
    ) -> Iterator[Result]:
        """See `TaskExecutor`. Raises what a task raised; MaxlmError: the cluster
        failed."""
        import ray
        from ray import exceptions

        task = ray.remote(_run_task)
        workspace = self._workspace
        function_id = uuid.uuid4()
        waiting_jobs = iter(jobs)
        running: list[ray.ObjectRef] = []
        try:
            # Once for all tasks: the function may hold the names of a hundred thousand
            # shards.
            pickled = ray.put(pickle.dumps(function))
            while True:
                num_free = self._count_tasks_to_submit() - len(running)
                for job in itertools.islice(waiting_jobs, max(0, num_free)):
                    running.append(task.remote(workspace, function_id, pickled, job))
                if not running:
                    return
                done, running = ray.wait(running)
                yield ray.get(done[0])
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, exceptions.RaySystemError):
                raise _make_cluster_error(error.cause) from error
            raise error.cause from error
        except (exceptions.RayError, ConnectionError) as error:
            raise _make_cluster_error(error) from error
        finally:
            # Without a connection Ray would start another cluster here to cancel tasks
            # on.
            if running and ray.is_initialized():
                _cancel_tasks(running)

    def _count_tasks_to_submit(self) -> int:
        """Tasks to be under way: without `workers` twice the CPUs, so that none of them
        waits for this process, and so that an autoscaler sees what there is to do."""
        import ray

        if self._workers is not None:
            return self._workers
        return 2 * max(1, int(ray.cluster_resources().get("CPU", 0)))


def _make_workspace(marker: Path | None, packages: Sequence[str]) -> _Workspace:
    names = dict.fromkeys(["maxlm", *packages])
    return _Workspace(
        working_folder=os.getcwd(),
        marker=None if marker is None else str(marker),
        versions=tuple((name, version(name)) for name in names),
    )


def _cancel_tasks(references: Sequence["ray.ObjectRef"]) -> None:
    """Ends tasks: none of them is to write when its folder is no longer locked."""
    import ray
    from ray import exceptions

    with suppress(exceptions.RayError, ConnectionError):
        for reference in references:
            ray.cancel(reference, force=True)
        ray.wait(
            list(references), num_returns=len(references), timeout=_SECONDS_TO_CANCEL
        )


def _connect(address: str | None) -> None:
    import ray

    # A cluster that starts here reports its use to nobody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    place = address or os.environ.get("RAY_ADDRESS") or "this machine"
    # No dashboard of a cluster that starts here; another has what it has.
    include_dashboard = None if address else False
    try:
        _check_that_one_listens(place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of what the error below says.
            ray.init(
                address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=include_dashboard,
            )
    # What Ray raises where it cannot connect.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or _get_first_line(error)
        fix = (
            "start one with `ray start --head`, and give ray://HOST:PORT of its Ray "
            f"client server (port {_CLIENT_PORT} unless --ray-client-server-port says "
            "otherwise)"
        )
        # Ray's client does not say that a token was asked for.
        if isinstance(error, ConnectionError) and "timeout" in reason:
            fix += (
                "; if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            )
        message = f"no Ray cluster answers at {place} ({reason})"
        raise MaxlmError(message, where="--on", fix=fix) from error


def _check_that_one_listens(address: str) -> None:
    """Raises OSError if nothing listens at the host and port of an address, if it has
    them: Ray itself would wait for half a minute, or for two."""
    url = urlsplit(address if "://" in address else f"//{address}")
    default_port = _CLIENT_PORT if url.scheme == "ray" else None
    port = url.port or default_port
    if url.hostname and port:
        target = (url.hostname, port)
        socket.create_connection(target, timeout=_SECONDS_TO_CONNECT).close()


def _make_cluster_error(error: Exception) -> MaxlmError:
    # Ray's client tells the reason in a line of its own.
    details = re.search(r'details = "(.*)"', str(error))
    if details:
        reason = details[1]
    else:
        reason = _get_first_line(error).removeprefix("System error: ")
    if reason.startswith("No module named"):
        message = f"a machine of the Ray cluster cannot read its task ({reason})"
        fix = (
            f"install maxlm {version('maxlm')} as it is here on every machine of the "
            "cluster"
        )
        return MaxlmError(message, where="--on", fix=fix)
    event = "the Ray cluster gave up on a task"
    if isinstance(error, ConnectionError):
        event = "the Ray cluster is gone"
    fix = (
        "look at `ray status` and at the memory of its machines, then run the command "
        "again: it goes on where it stopped"
    )
    return MaxlmError(f"{event} ({reason})", where="--on", fix=fix)


def _get_first_line(error: Exception) -> str:
    """Returns an error's first line, and the last too where the first announces
    more."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].endswith(":"):
        return f"{lines[0]} {lines[-1].strip()}"
    return lines[0]


def _run_task(
    workspace: _Workspace, function_id: uuid.UUID, pickled: bytes, job: object
) -> object:
    _enter_workspace(workspace)
    return run_pickled(function_id, pickled, job)


@lru_cache(maxsize=1)
def _enter_workspace(workspace: _Workspace) -> None:
    """Prepares a worker for the tasks of one run. Raises MaxlmError: it lacks what they
    need."""
    host = socket.gethostname()
    try:
        os.chdir(workspace.working_folder)
    except OSError as error:
        message = f"a Ray worker on {host} does not see this folder ({error.strerror})"
        fix = "run the command in a folder that all machines of the cluster share"
        raise MaxlmError(message, where=workspace.working_folder, fix=fix) from error
    if workspace.marker is not None and not os.path.exists(workspace.marker):
        message = f"a Ray worker on {host} does not see what is written to this folder"
        fix = "put it on a disk that all machines of the cluster have under this path"
        folder = os.path.dirname(workspace.marker)
        raise MaxlmError(message, where=folder, fix=fix)
    for name, expected in workspace.versions:
        try:
            installed = version(name)
        except PackageNotFoundError:
            installed = "none"
        if installed != expected:
            message = (
                f"a Ray worker on {host} has {name} {installed}, and this machine "
                f"{expected}"
            )
            fix = f"pip install '{name}=={expected}' on every machine of the cluster"
            raise MaxlmError(message, where="--on", fix=fix)
    use_one_tokenizer_thread()
