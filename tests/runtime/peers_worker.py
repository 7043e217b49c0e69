"""One process of several that meet, as the environment says: ``peers_worker.py
ACTION``.

ACTION: ``loop`` adds up over all processes until it is stopped; ``late`` does so once
and ends, but process 0 stays for long; ``fault`` finds a mistake of the user's after a
while; ``busy`` is a loop in Python, which lets no other thread run for long.
"""

import os
import sys
import time

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST
from maxlm.runtime.cluster import find_cluster
from maxlm.runtime.session import FAILED, describe_lost_peer, join_cluster


def main() -> int:
    action = sys.argv[1]
    cluster = find_cluster(os.environ)
    peers = None
    assert cluster
    try:
        peers = join_cluster(cluster, {}, wait_seconds=120, peer_timeout_seconds=10)
        add_up(action)
    # As `maxlm` itself does: whatever happened here, the other processes must hear of
    # it, or they wait for this one.
    except Exception as error:
        if isinstance(error, MaxlmError):
            code = error.exit_code
            text = str(error)
        else:
            code = LOST if describe_lost_peer(error) else FAILED
            text = repr(error)
        print(text, flush=True)
        if peers:
            peers.abort_all_processes(code, text)
        return code
    if action == "late" and cluster.process_id == 0:
        time.sleep(600)
    peers.leave()
    return 0


def add_up(action: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    number = jax.process_index()
    count = jax.process_count()
    mesh = jax.make_mesh((count,), ("data",), devices=[*jax.devices()])
    split = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    values = jax.make_array_from_process_local_data(split, np.float32([number + 1]))
    total = jax.jit(jnp.sum, out_shardings=whole)
    print(f"process {number} of {count}: {float(total(values)):g}", flush=True)
    while action != "late":
        if action == "busy":
            for _ in range(10_000_000):
                pass
        else:
            total(values).block_until_ready()
        if action == "fault":
            raise MaxlmError("no such folder", where="data.folder")


if __name__ == "__main__":
    sys.exit(main())
