"""`maxlm train` that records every batch as it is taken.

    python benchmarks/witness.py FOLDER train CONFIG ...

A process appends to a file of its own in FOLDER a line for each row of the global batch
that its devices hold: the step, the row, and the SHA-256 of what stands in it. Rows are
counted as the loader does, so that runs on other hosts and meshes compare.
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PACE = 0.02  # seconds a batch at least: who aims at a step must be able to see it


def main() -> int:
    folder, *arguments = sys.argv[1:]
    from maxlm.cli.main import main as maxlm
    from maxlm.run import rollout_source

    taken = rollout_source.open_training_batches

    @contextmanager
    def witnessed(
        setup: Any,
        source: Any,
        start: int,
        skips: Any = (),
        is_stop_requested: Callable[[], bool] = lambda: False,
    ) -> Iterator[Iterator[Any]]:
        path = Path(folder) / f"{os.getpid()}.txt"
        with taken(setup, source, start, skips) as batches, path.open("a") as file:

            def noted() -> Iterator[Any]:
                for step, batch in enumerate(batches, start + 1):
                    lines = [
                        f"{step} {row} {digest}\n"
                        for row, digest in rows(batch).items()
                    ]
                    file.write("".join(lines))
                    file.flush()
                    time.sleep(PACE)
                    yield batch

            yield noted()

    rollout_source.open_training_batches = witnessed
    return maxlm(arguments)


def rows(batch: Mapping[str, Any]) -> dict[int, str]:
    """Digests of the global rows that this process holds, of arrays [micro-batches,
    rows, S]."""
    digests: dict[int, dict[str, bytes]] = {}
    for name, array in batch.items():
        numbers = np.arange(array.shape[0] * array.shape[1]).reshape(array.shape[:2])
        for shard in array.addressable_shards:
            values = np.asarray(shard.data).reshape(-1, array.shape[2])
            for row, value in zip(
                numbers[shard.index[:2]].ravel(), values, strict=True
            ):
                digests.setdefault(int(row), {})[name] = value.tobytes()
    return {
        row: hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()
        for row, parts in sorted(digests.items())
    }


if __name__ == "__main__":
    sys.exit(main())
