"""Measured programs on disk, so that none is compiled twice."""

import hashlib
import json
import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pallas_kernels
from benchmarks.kernel_cycles import static
from benchmarks.kernel_cycles.static.costs import CallCosts, KernelCosts, RegionCosts
from benchmarks.kernel_cycles.static.measure import (
    CompileError,
    CompilerKilled,
    Spec,
    measure,
)
from benchmarks.kernel_cycles.tuning import versions
from pallas_kernels.chips import CHIPS

_KERNELS = Path(pallas_kernels.__file__).parent
_STATIC = Path(static.__file__).parent
_PEERS = "benchmarks.kernel_cycles.static.peers"
_REFUSED, _NOT_COUNTED = "CompileError", "ValueError"


class Cache:
    """A folder of measured programs, one JSON file each.

    A file's key holds all that a program's costs follow from: its ``Spec``, the chip,
    versions of the packages, and a digest of the sources (see :func:`sources`). What
    the compiler refuses or cannot be counted is kept as such.
    """

    def __init__(self, folder: Path):
        """
        Raises:
            OSError: a folder that cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def measure(self, spec: Spec, chip: str) -> CallCosts:
        """As :func:`~benchmarks.kernel_cycles.static.measure`; only inner loops'
        regions."""
        key = self._key(spec, chip)
        entry = self._read(key)
        if entry is None:
            entry = _measured(spec, chip)
            self._write(key, entry)
        if "error" in entry:
            kind, message = entry["error"]
            raise (CompileError if kind == _REFUSED else ValueError)(message)
        return _costs(entry["costs"], chip)

    def has(self, spec: Spec, chip: str) -> bool:
        """Whether :meth:`measure` would compile nothing."""
        return self._read(self._key(spec, chip)) is not None

    def _key(self, spec: Spec, chip: str) -> dict[str, Any]:
        module = spec.function.partition(":")[0]
        packages = ["jax", "jaxlib", "libtpu"] + ["tokamax"] * (
            "tokamax" in spec.function
        )
        key = asdict(spec) | {
            "chip": chip,
            "versions": versions(*packages),
            "sources": digest(sources(module)),  # as they are now: a run takes long
        }
        return json.loads(json.dumps(key, default=dict))  # tuples are lists when read

    def _path(self, key: dict[str, Any]) -> Path:
        name = key["function"].rpartition(":")[2]
        text = json.dumps(key, sort_keys=True)
        return self._folder / f"{key['chip']}-{name}-{_hash(text.encode())}.json"

    def _read(self, key: dict[str, Any]) -> dict[str, Any] | None:
        try:
            entry = json.loads(self._path(key).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return entry if entry["key"] == key else None

    def _write(self, key: dict[str, Any], entry: dict[str, Any]) -> None:
        """At once: who is stopped leaves no half of a file."""
        path = self._path(key)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"key": key} | entry, indent=1) + "\n")
        draft.replace(path)


def sources(module: str) -> list[Path]:
    """Files from which the costs of a module's programs follow: what counts; and for
    programs that are not others' kernels, all kernels with their tuned blocks."""
    files = {_KERNELS / "chips.py", *_STATIC.glob("*.py")}
    if module != _PEERS:
        files |= {*_KERNELS.glob("*/*.py"), *_KERNELS.glob("*/*.json")}
        spec = find_spec(module)
        if spec and spec.origin:
            files.add(Path(spec.origin))
    return sorted(files)


def digest(files: list[Path]) -> str:
    """Of their names and contents."""
    return _hash(
        b"\0".join(part for f in files for part in (f.name.encode(), f.read_bytes()))
    )


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _measured(spec: Spec, chip: str) -> dict[str, Any]:
    try:
        costs = measure(spec, chip)
    except CompilerKilled:
        raise
    except CompileError as error:
        return {"error": [_REFUSED, str(error)]}
    except ValueError as error:
        return {"error": [_NOT_COUNTED, str(error)]}
    kernels = [
        asdict(k) | {"regions": list(map(asdict, k.inner_loops))} for k in costs.kernels
    ]
    return {"costs": {"kernels": kernels, "temp_bytes": costs.temp_bytes}}


def _costs(entry: dict[str, Any], chip: str) -> CallCosts:
    kernels = [_kernel(kernel) for kernel in entry["kernels"]]
    return CallCosts(CHIPS[chip], tuple(kernels), (), entry["temp_bytes"])


def _kernel(fields: dict[str, Any]) -> KernelCosts:
    # JSON has lists where the dataclass has tuples.
    tuples = {
        "cycles_by_core": tuple(fields["cycles_by_core"]),
        "grid": fields["grid"] and tuple(fields["grid"]),
        "regions": tuple(RegionCosts(**region) for region in fields["regions"]),
    }
    return KernelCosts(**(fields | tuples))
