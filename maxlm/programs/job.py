"""One process's part in a job: its peers found, and left so that they know how it ended."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST, of_the_machine
from maxlm.config.keys import dotted, flatten
from maxlm.programs.cluster import find_cluster
from maxlm.programs.peers import FAILED, join_cluster, lost_peer
from maxlm.run import RunConfig

_INTERRUPTED = 130


@contextmanager
def taking_part(
    config: RunConfig,
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Iterator[None]:
    """Join the cluster that this process was started in, if it is one of several, for the block.

    It comes before any other use of JAX. A process whose block fails ends at once, and all others
    with it: they would wait for it in vain. What ends on all of them together is left to each.

    Args:
        coordinator, num_processes, process_id: in place of what the environment says; see
            ``find_cluster``.

    Raises:
        MaxlmError: peers that do not come, or differ; what the block raises on all processes.
    """
    cluster = find_cluster(
        os.environ, coordinator=coordinator, num_processes=num_processes, process_id=process_id
    )
    if cluster is None:
        yield
        return
    faults = config.faults
    peers = join_cluster(
        cluster, wait_seconds=faults.join_seconds, peer_seconds=faults.peer_seconds
    )
    import jax

    try:
        facts = {dotted(key): value for key, value in flatten(config.model_dump(mode="json"))}
        facts["devices"] = f"{jax.local_device_count()} {jax.local_devices()[0].device_kind}"
        peers.check(facts, wait_seconds=faults.join_seconds)
        yield
    except MaxlmError as error:
        if not error.together:
            # A file that needs all processes was not written because one is gone: no mistake.
            if error.__cause__ and (lost := lost_peer(error.__cause__)):
                peers.end_all(LOST, lost)
            print(f"error: {error}", file=sys.stderr, flush=True)
            peers.end_all(error.exit_code, str(error))
        peers.leave()
        raise
    except KeyboardInterrupt:
        peers.end_all(_INTERRUPTED, "interrupted")
    except BaseException as error:
        if known := of_the_machine(error):
            print(f"error: {known}", file=sys.stderr, flush=True)
            peers.end_all(known.exit_code, str(known))
        lost = lost_peer(error)
        if not lost:
            traceback.print_exc()
        peers.end_all(LOST if lost else FAILED, lost or repr(error))
    peers.leave()
