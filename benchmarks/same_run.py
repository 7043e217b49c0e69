"""Compare the results of two runs by their files alone, without maxlm's code."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What differs between two runs of the same maths.
TIMES = ("seconds", "loader_wait", "tokens_per_second", "mfu", "mfu_full_attention")
TIMES += ("process_memory_peak", "device_memory_peak")
# ... and what a plan for another mesh says.
PLANNED = ("planned_seconds", "planned_mfu", "planned_memory")


@dataclass(frozen=True)
class Compared:
    """One comparison with an unbroken run."""

    subject: str
    result: str
    """In words, with figures."""
    wrong: bool


def compare(
    unbroken: Path, broken: Path, step: int, limit: float | None = None
) -> list[Compared]:
    """The checkpoints of ``step`` and all records of two run folders.

    Args:
        limit: the most that arrays and losses may differ by, relative to them; None:
            not a bit.
    """
    arrays = [final_arrays(run, step) for run in (unbroken, broken)]
    runs = [list(timeless(run / "metrics.jsonl")) for run in (unbroken, broken)]
    places = [[(r["step"], "eval_loss" in r) for r in run] for run in runs]
    order = Compared(
        "steps recorded",
        f"{len(places[1])} of {len(places[0])}, each once and in order",
        places[0] != places[1],
    )
    if limit is not None:
        name, apart = furthest(*arrays)
        losses = [[r.get("loss", r.get("eval_loss")) for r in run] for run in runs]
        loss = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=False))
        return [
            Compared(
                "arrays", f"{apart:.1e} apart at most ({name})", not apart <= limit
            ),
            Compared("losses", f"{loss:.1e} apart at most", not loss <= limit),
            order,
        ]
    wrong = [n for n in arrays[0] if arrays[0][n].tobytes() != arrays[1][n].tobytes()]
    odd = [r["step"] for r, s in zip(*runs, strict=False) if r != s]
    before, after = (metadata(run, step) for run in (unbroken, broken))
    other = [name for name in before if before[name] != after.get(name)]
    return [
        Compared("arrays", _equal(len(arrays[0]), wrong), bool(wrong)),
        Compared("records", _equal(len(runs[0]), odd), bool(odd)),
        Compared("metadata", _equal(len(before), other), bool(other)),
        order,
    ]


def _equal(count: int, wrong: list[Any]) -> str:
    some = ", ".join(map(str, wrong[:3]))
    return (
        f"{len(wrong)} of {count} differ ({some[:200]})" if wrong else f"{count} equal"
    )


def final_arrays(run: Path, step: int) -> dict[str, Any]:
    """By name, as Orbax reads them without being told anything of them."""
    import numpy as np
    import orbax.checkpoint as ocp
    from etils import epath

    path = epath.Path(run) / "checkpoints" / str(step) / "state"
    reader = ocp.PyTreeCheckpointHandler(use_zarr3=True)
    names = reader.metadata(path).tree
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def metadata(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says beside the arrays, but for the run's own name."""
    path = run / "checkpoints" / str(step) / "metadata" / "metadata"
    checkpoint_metadata = json.loads(path.read_text())
    del checkpoint_metadata["config"]["name"], checkpoint_metadata["sha256"]
    return checkpoint_metadata


def timeless(metrics: Path) -> Iterator[dict[str, Any]]:
    for line in metrics.read_text().splitlines():
        yield {k: v for k, v in json.loads(line).items() if k not in TIMES + PLANNED}


def furthest(one: dict[str, Any], other: dict[str, Any]) -> tuple[str, float]:
    """The array that differs most between two states, and by how much of its Euclidean
    norm."""
    import numpy as np

    if one.keys() != other.keys():
        return "names", float("inf")
    whole = {name: np.float64(array) for name, array in one.items()}
    apart = {
        name: float(
            np.linalg.norm(array - other[name]) / max(np.linalg.norm(array), 1e-30)
        )
        for name, array in whole.items()
    }
    return max(apart.items(), key=lambda item: item[1])


def batches_seen(unbroken: Path, broken: Path) -> Compared:
    """What two runs' witnesses wrote down (see witness.py): whether every row that was
    taken, once or again, is the one that the unbroken run took, and none is missing."""
    truth, digests = witnessed(unbroken), witnessed(broken)
    steps = {step for step, _ in digests}
    again = {step for (step, _), taken in digests.items() if len(taken) > 1}
    wrong = [
        place
        for place, taken in digests.items()
        if set(taken) != set(truth.get(place, ()))
    ]
    missing = truth.keys() - digests.keys()
    words = f"{len(steps)} steps, {len(again)} of them taken again"
    if wrong or missing:
        words += f"; rows (step, row) that differ: {wrong[:3]}, are missing: {sorted(missing)[:3]}"
    else:
        words += ": the same rows each time"
    return Compared("batches", words, bool(wrong or missing))


def witnessed(folder: Path) -> dict[tuple[int, int], list[str]]:
    """(step, global row) → the digests written down, as often as it was taken."""
    taken = defaultdict(list)
    for path in folder.iterdir():
        for line in path.read_text().split("\n")[:-1]:  # the last may be torn
            step, row, digest = line.split()
            taken[int(step), int(row)].append(digest)
    return dict(taken)


def copied(run: Path, remote: Path, step: int) -> Compared:
    """Whether the copy of the last checkpoint is complete, and is it."""
    here, there = (
        {
            path.relative_to(place).as_posix(): hashlib.sha256(
                path.read_bytes()
            ).digest()
            for path in place.rglob("*")
            if path.is_file()
        }
        for place in (run / "checkpoints" / str(step), remote / str(step))
    )
    complete = there.pop("COMPLETE", None) is not None
    wrong = [name for name in here if here[name] != there.get(name)]
    words = _equal(len(here), wrong) if complete else "not complete"
    return Compared("files of the remote copy", words, bool(wrong) or not complete)


def left_behind(run: Path, local: Path, name: str, remote: Path) -> Compared:
    """What killed processes left, and the last start should have removed: files and
    folders under temporary names, copies that are not complete; and checkpoints that a
    kill has damaged."""
    there = [*(run / "checkpoints").iterdir(), *local.glob(f"{name}-*/*/*")]
    temporary_or_damaged = [
        path for path in there if path.suffix in ("", ".safetensors")
    ]
    litter = [
        path.name
        for path in there
        if path not in temporary_or_damaged or path.name.startswith(".")
    ]
    for copy in remote.iterdir():
        files = any(path.is_file() for path in copy.rglob("*"))
        litter += [f"copy {copy.name}"] * (files and not (copy / "COMPLETE").exists())
    words = f"left: {', '.join(sorted(litter)[:4])}" if litter else "nothing"
    return Compared("litter", words, bool(litter))
