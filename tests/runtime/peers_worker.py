"""One process of several that meet: ``peers_worker.py WAIT_SECONDS PEER_SECONDS ACTION``.

ACTION: ``once`` adds up over all processes and ends; ``late`` too, but process 0 stays for long;
``loop`` does so until it is stopped; ``fault`` is a loop in which process 1 finds a mistake of the
user's; ``busy`` is one in Python, which lets no other thread run for long; ``unstarted`` is a
process where JAX does not start. FACT in the environment is compared before; which processes they
are is read from it too.
"""

import os
import sys
import time

from maxlm.config import MaxlmError
from maxlm.config.errors import LOST
from maxlm.runtime.cluster import find_cluster
from maxlm.runtime.peers import FAILED, describe_lost_peer, join_cluster


def main() -> int:
    wait, silent, action = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    cluster = find_cluster(os.environ)
    assert cluster
    peers = None
    if action == "unstarted":
        import jax

        jax.distributed.initialize = does_not_start
    try:
        peers = join_cluster(cluster, wait_seconds=wait, peer_seconds=silent)
        peers.check({"fact": os.environ.get("FACT")}, wait_seconds=wait)
        add_up(action)
    except Exception as error:
        if isinstance(error, MaxlmError):
            code, text = error.exit_code, str(error)
        else:
            code, text = (LOST if describe_lost_peer(error) else FAILED), repr(error)
        print(text, flush=True)
        if peers:
            peers.end_all(code, text)
        return code
    if action == "late" and cluster.process_id == 0:
        time.sleep(600)
    peers.leave()
    return 0


def does_not_start(*_: object, **__: object) -> None:
    raise RuntimeError("DEADLINE_EXCEEDED:\n nobody came")


def add_up(action: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    number, count = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh((count,), ("data",), devices=[*jax.devices()])
    split = jax.NamedSharding(mesh, jax.P("data"))
    whole = jax.NamedSharding(mesh, jax.P())
    own = jax.make_array_from_process_local_data(split, np.float32([number + 1]))
    total = jax.jit(jnp.sum, out_shardings=whole)
    print(f"process {number} of {count}: {float(total(own)):g}", flush=True)
    while action not in ("once", "late"):
        if action == "fault" and number == 1:
            raise MaxlmError("no such folder", where="data.folder")
        if action == "busy":
            for _ in range(10_000_000):
                pass
        else:
            total(own).block_until_ready()


if __name__ == "__main__":
    sys.exit(main())
