# llama3_8b on h100x32: 32 H100 GPUs on 4 hosts
"""Start one process on each node, and exit with the worst of their exit codes.

Run it on the cluster: ray job submit --working-dir FOLDER -- python FILE
`ray job stop` makes the processes save and exit. RAY_JOB_STOP_WAIT_TIME_S on the
cluster sets how long Ray waits for that (3 seconds by default).
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
RESTART = (76, 75)  # a process hung or died; preempted, state saved
WORST = (2, 1, *RESTART, 0)


@ray.remote(max_restarts=0)
class Host:
    """The process of one node."""

    def address(self) -> str:
        while True:
            # Above Ray's ports and below the ephemeral ones, so that no other program
            # takes it before process 0 listens on it.
            port = random.randrange(20_000, 32_768)
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("", port))
                return f"{ray.util.get_node_ip_address()}:{port}"

    def start(self, environment: dict[str, str]) -> None:
        # Ray kills this process when the actor ends, for whatever reason.
        self.process = subprocess.Popen(COMMAND, env={**os.environ, **environment})

    def code(self) -> int | None:
        return self.process.poll()

    def send(self, number: int) -> None:
        self.process.send_signal(number)


def attempt(signals: list[int]) -> int:
    """Run all processes once. Signals appended to `signals` are sent to each."""
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
        return watch(hosts, signals)
    except RayActorError as error:
        print(f"lost a node: {error}", file=sys.stderr)
        return 76
    finally:
        remove_placement_group(group)


def normalize_code(code: int) -> int:
    """Map an exit code to one of `WORST`.

    A process killed by a signal has a negative code in Python and one above 128 in a
    shell: both become 76, except Ctrl-C's 130. Any other unknown code becomes 1.
    """
    if code in WORST:
        return code
    killed = code < 0 or (code > 128 and code != 130)
    return 76 if killed else 1


def watch(hosts: list, signals: list[int]) -> int:
    """Wait for all processes to end, and return the worst of their codes.

    `GRACE` seconds after the first process fails, the others get SIGTERM, and as long
    after that SIGKILL.
    """
    signals_sent = 0
    failure_time = None
    while True:
        codes = ray.get([host.code.remote() for host in hosts])
        if None not in codes:
            return min(map(normalize_code, codes), key=WORST.index)
        if failure_time is None and any(codes):
            failure_time = time.monotonic()
        if failure_time is not None:
            seconds = time.monotonic() - failure_time
            if seconds > GRACE * (1 + signals_sent):
                signals.append(signal.SIGKILL if signals_sent else signal.SIGTERM)
                signals_sent += 1
        while signals:
            number = signals.pop()
            ray.get([host.send.remote(number) for host in hosts])
        time.sleep(1)


def main() -> int:
    signals = []
    stopping = False

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        signals.append(number)
        stopping = True

    ray.init()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    for _ in range(RETRIES + 1):
        code = attempt(signals)
        print(f"exit code {code}", file=sys.stderr)
        if code not in RESTART or stopping:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
