# llama3_8b on h100x32: 32 H100 GPUs on 4 hosts
"""Starts one process on each node and ends with the worst of their codes.

Run it on the cluster: ray job submit --working-dir FOLDER -- python FILE
`ray job stop` asks the processes to save and end; RAY_JOB_STOP_WAIT_TIME_S on the cluster says
how long Ray waits for that (3 seconds if it is not set).
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODES = 4
BUNDLE = {"CPU": 1, "GPU": 8}
RETRIES = 20
GRACE = 120  # seconds
ENVIRONMENT = {"NCCL_DEBUG": "WARN"}
COMMAND = [
    "maxlm",
    "train",
    "llama3_8b",
    "data.sources=[{store: /shared/tokens}]",
    "folder=/shared/runs",
    "tokenizer.path=/shared/tokenizer",
    "train.micro_batches=4",
]
RESTART = (76, 75)  # a process hung or died; stopped in time, state saved
WORST = (2, 1, *RESTART, 0)


@ray.remote(max_restarts=0)
class Host:
    """The process of one node."""

    def address(self) -> str:
        while True:
            # Above Ray's own and below those that connections get: it stays free until it is used.
            port = random.randrange(20_000, 32_768)
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("", port))
                return f"{ray.util.get_node_ip_address()}:{port}"

    def start(self, environment: dict[str, str]) -> None:
        # Ray kills it with this actor, whatever ends that.
        self.process = subprocess.Popen(COMMAND, env={**os.environ, **environment})

    def code(self) -> int | None:
        return self.process.poll()

    def send(self, number: int) -> None:
        self.process.send_signal(number)


def attempt(asked: list[int]) -> int:
    """Run all processes once; signals that are put into `asked` go to each."""
    group = placement_group([BUNDLE] * NODES, strategy="STRICT_SPREAD")
    try:
        ray.get(group.ready())
        hosts = [
            Host.options(
                num_cpus=BUNDLE["CPU"],
                num_gpus=BUNDLE.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, node),
            ).remote()
            for node in range(NODES)
        ]
        cluster = {
            "MAXLM_COORDINATOR": ray.get(hosts[0].address.remote()),
            "MAXLM_NUM_PROCESSES": str(NODES),
        }
        starts = [
            host.start.remote(ENVIRONMENT | cluster | {"MAXLM_PROCESS_ID": str(node)})
            for node, host in enumerate(hosts)
        ]
        ray.get(starts)
        return watch(hosts, asked)
    except RayActorError as error:
        print(f"a node is gone: {error}", file=sys.stderr)
        return 76
    finally:
        remove_placement_group(group)


def meaning(code: int) -> int:
    """One of `WORST`: 76 for a signal's, as Python or a shell gives it, but Ctrl-C's; else 1."""
    if code in WORST:
        return code
    return 76 if code < 0 or (code > 128 and code != 130) else 1


def watch(hosts: list, asked: list[int]) -> int:
    """The worst code, once all have ended: `GRACE` seconds after the first that did not end well
    the others are told to, and as long after that killed."""
    sent, failed = 0, None
    while True:
        codes = ray.get([host.code.remote() for host in hosts])
        if None not in codes:
            return min(map(meaning, codes), key=WORST.index)
        if failed is None and any(codes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > GRACE * (1 + sent):
            asked.append(signal.SIGKILL if sent else signal.SIGTERM)
            sent += 1
        while asked:
            number = asked.pop()
            ray.get([host.send.remote(number) for host in hosts])
        time.sleep(1)


def main() -> int:
    asked, stopping = [], []

    def stop(number: int, _: object) -> None:
        asked.append(number)
        stopping.append(number)

    ray.init()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    for _ in range(RETRIES + 1):
        code = attempt(asked)
        print(f"ended with {code}", file=sys.stderr)
        if code not in RESTART or stopping:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
