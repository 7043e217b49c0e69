"""Joins a process to its job's cluster, and tells its peers how it ends."""

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST, convert_os_error
from maxlm.config.keys import flatten, join_key
from maxlm.runtime.cluster import find_cluster
from maxlm.runtime.peers import FAILED, Peers, describe_lost_peer, join_cluster
from maxlm.runtime.rendezvous import check_processes_match

_INTERRUPTED = 130


@contextmanager
def distributed_session(
    settings: Mapping[str, Any],
    *,
    join_timeout_seconds: float,
    peer_timeout_seconds: float,
) -> Iterator[None]:
    """Joins the cluster that this process was started in, if it is one of several, for the block.

    Enter it before any other use of JAX. A process whose block fails ends at once and ends all
    others, which would wait for it forever. An error raised by all
    processes together leaves the block as usual.

    Args:
        settings: the run's settings as nested JSON values; all processes must have the same.
        join_timeout_seconds: how long to wait for the other processes to start.
        peer_timeout_seconds: how long a process may stay silent before it counts as lost.
    """
    cluster = find_cluster(os.environ)
    if cluster is None:
        yield
        return
    facts = {join_key(key): value for key, value in flatten(settings)}
    peers = join_cluster(
        cluster, facts, wait_seconds=join_timeout_seconds, peer_timeout_seconds=peer_timeout_seconds
    )
    try:
        _check_same_devices(peers)
        yield
    except MaxlmError as error:
        if not error.on_all_processes:
            # A file that needs all processes was not written because one is gone: no mistake.
            if error.__cause__ and (lost := describe_lost_peer(error.__cause__)):
                peers.abort_all_processes(LOST, lost)
            print(f"error: {error}", file=sys.stderr, flush=True)
            peers.abort_all_processes(error.exit_code, str(error))
        peers.leave()
        raise
    except KeyboardInterrupt:
        peers.abort_all_processes(_INTERRUPTED, "interrupted")
    except BaseException as error:
        if known := convert_os_error(error):
            print(f"error: {known}", file=sys.stderr, flush=True)
            peers.abort_all_processes(known.exit_code, str(known))
        lost = describe_lost_peer(error)
        if not lost:
            traceback.print_exc()
        peers.abort_all_processes(LOST if lost else FAILED, lost or repr(error))
    peers.leave()


def _check_same_devices(peers: Peers) -> None:
    import jax

    devices = [jax.local_devices(process) for process in range(jax.process_count())]
    try:
        facts = [{"devices": f"{len(own)} {own[0].device_kind}"} for own in devices]
        check_processes_match(peers.hosts, facts)
    except MaxlmError as error:
        error.on_all_processes = True  # each sees all devices
        raise
