"""Reading a checkpoint's folder: ``state/`` (Orbax, zarr3) and ``metadata/metadata`` (JSON, with a
checksum of its own).

Each process reads what its own devices hold and waits for no other, so that one that cannot read
holds nobody up.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from maxlm import __version__
from maxlm.config import MaxlmError, compare_configs
from maxlm.train.checkpoint.fingerprint import fingerprints
from maxlm.train.grouped import Groups, is_grouped, on_disk, reshaped

Result = TypeVar("Result")
PyTree = Any
Leaves = dict[str, Any]


_PAUSES = (0.1, 1.0)  # seconds between tries
_CHECKSUM = "sha256"


class Unreadable(MaxlmError):
    """A checkpoint that is damaged, or out of reach: another may be read in its place."""


def named_leaves(tree: PyTree, prefix: str = "") -> Leaves:
    """The leaves of any pytree by dotted path; dict keys, attribute names and indices alike."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = jax.tree_util.keystr
    return {prefix + name(path, simple=True, separator="."): leaf for path, leaf in leaves}


def group_sizes(specs: PyTree) -> Groups:
    """The ``grouped`` argument of ``Checkpointer``, from declarations (``ParamSpec``)."""
    return {name: spec.shape[:2] for name, spec in named_leaves(specs).items() if spec.lead == 2}


def as_on_disk(leaves: Mapping[str, jax.Array], groups: Groups) -> dict[str, jax.Array]:
    """Arrays in the shapes that are written: layers in one row."""
    grouped = {n: leaf for n, leaf in leaves.items() if is_grouped(n, leaf.shape, groups)}
    want = {name: on_disk(placed(leaf)) for name, leaf in grouped.items()}
    return dict(leaves) | reshaped(grouped, want)


def placed(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, or of one to come (default: the first device)."""
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_metadata(
    step: int, arrays: Mapping[str, jax.Array], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is saved beside arrays: JSON values, with their fingerprints and a checksum of
    all. All processes call it together; it waits for the arrays."""
    versions = {name: version(name) for name in ("jax", "orbax-checkpoint")}
    made = {"step": step, "versions": versions | {"maxlm": __version__}, **metadata}
    made |= {"fingerprints": fingerprints(arrays)}
    return {**made, _CHECKSUM: _checksum(made)}


def parse_metadata(text: str | bytes) -> dict[str, Any]:
    """Return what :func:`make_metadata` returned, without its checksum.

    Raises:
        ValueError: it is damaged.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("its metadata is no JSON object")
    checksum = value.pop(_CHECKSUM, None)
    # Older versions wrote neither: damage to one of the names does not make it one of theirs.
    newer = checksum is not None or "maxlm" in str(value.get("versions"))
    if newer and checksum != _checksum(value):
        raise ValueError("its metadata is not what was saved")
    return value


def _checksum(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def read_metadata(path: Path) -> dict[str, Any]:
    """What was saved beside the state.

    Raises:
        Unreadable: it is not there, or is damaged.
    """
    return patiently(path, lambda: parse_metadata((path / "metadata" / "metadata").read_text()))


def read_arrays(
    path: Path, abstract: PyTree, groups: Groups, *, prefix: str = "", complete: bool = True
) -> tuple[Leaves, Leaves]:
    """Arrays by canonical name, as they are on disk, in the shardings that are asked for.

    Args:
        abstract: ``ShapeDtypeStruct`` leaves; arrays are cast to their dtypes.
        prefix: of the names, where ``abstract`` is a sub-tree.
        complete: there must be no other arrays.

    Returns:
        Their dtypes on disk, and the arrays.

    Raises:
        Unreadable: damaged.
        MaxlmError: of another model or optimizer; the first array that differs is named,
            parameters before others.
    """
    dtypes, wanted = check_arrays(path, abstract, groups, prefix=prefix, complete=complete)
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=not complete,
    )
    return dtypes, patiently(path, lambda: _handler().restore(_state(path), args=arguments))


def check_arrays(
    path: Path, abstract: PyTree, groups: Groups, *, prefix: str = "", complete: bool = True
) -> tuple[Leaves, Leaves]:
    """Check, reading no array, that :func:`read_arrays` would find what it looks for.

    Returns:
        Leaves by name: dtypes as they are stored, and as they are wanted on disk.

    Raises:
        Unreadable, MaxlmError: as that does.
    """
    stored = patiently(path, lambda: _handler().metadata(_state(path)).tree)
    held = {name: placed(leaf) for name, leaf in named_leaves(abstract, prefix).items()}
    wanted = {n: on_disk(x) if is_grouped(n, x.shape, groups) else x for n, x in held.items()}
    shapes = {n: tuple(m.shape) for n, m in stored.items() if complete or n.startswith(prefix)}
    _check_same_arrays(shapes, wanted, where=str(path))
    return {name: stored[name].dtype for name in wanted}, wanted


def as_held(read: Leaves, abstract: PyTree, groups: Groups, prefix: str = "") -> PyTree:
    """What was read as the tree that was asked for. All processes call it together."""
    held = {name: placed(leaf) for name, leaf in named_leaves(abstract, prefix).items()}
    grouped = {name for name, leaf in held.items() if is_grouped(name, leaf.shape, groups)}
    arrays = read | reshaped({name: read[name] for name in grouped}, held)
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in held])


def verify(path: Any, read: Leaves, known: Mapping[str, int], dtypes: Mapping[str, Any]) -> None:
    """Check arrays against the fingerprints saved with them, where there are any, and where they
    were not cast. All processes call it together; it ends alike on all.

    Raises:
        Unreadable: naming an array that is not what was saved.
    """
    same = {n: x for n, x in read.items() if n in known and x.dtype == dtypes.get(n, x.dtype)}
    changed = [name for name, value in fingerprints(same).items() if value != known[name]]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        what = f"unreadable: {changed[0]}{others} is not what was saved"
        raise Unreadable(what, where=str(path), fix="restore another step")


def _state(path: Path) -> epath.Path:
    return epath.Path(path) / "state"


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_zarr3=True)


def patiently(path: Path | str, read: Callable[[], Result]) -> Result:
    """What ``read`` returns. Storage fails in as many ways as there are backends, and some of it
    passes: it is tried again before the checkpoint is said to be unreadable.

    Raises:
        Unreadable: it fails each time.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            return read()
        except MaxlmError:
            raise
        except Exception as error:
            if (pause := next(pauses, None)) is None:
                what = f"unreadable ({first_line(error)})"
                raise Unreadable(what, where=str(path), fix="restore another step") from error
        time.sleep(pause)


def first_line(error: Exception) -> str:
    """What an error says; of a long one its beginning and its end, which tells the cause; its kind
    if it says nothing."""
    lines = str(error).strip().splitlines()
    text = lines[0].split(" [")[0] if lines else type(error).__name__
    return text if len(text) <= 200 else f"{text[:80]} … {text[-120:]}"


def _check_same_arrays(
    stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str
) -> None:
    names = sorted({*stored, *wanted}, key=lambda name: (not name.startswith("params."), name))
    for name in names:
        there = str(list(stored[name])) if name in stored else "absent"
        here = str(list(wanted[name].shape)) if name in wanted else "absent"
        if there != here:
            other = "model" if name.startswith("params.") else "optimizer or training state"
            raise MaxlmError(
                f"checkpoint of another {other}: {name} is {there} in it, {here} in this run",
                where=where,
                fix="use the config it was trained with, or another run folder",
            )


def check_same(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    keys: Sequence[str],
    where: str = "resume",
    what: str = "the checkpoint was written",
) -> None:
    """Refuse to go on from a checkpoint whose config differs where it must not.

    Args:
        saved, current: configs as (nested) JSON values.
        keys: dotted keys that must be equal, each with all below it ("model", "data.seed").
        what: was done with the saved config, for the message.

    Raises:
        MaxlmError: naming every key that differs, with both values.
    """
    different = [
        f"{key}={theirs!r} became {ours!r}"
        for key, theirs, ours in compare_configs(saved, current)
        if any(key == top or key.startswith((f"{top}.", f"{top}[")) for top in keys)
    ]
    if different:
        raise MaxlmError(
            f"{what} with another config: {', '.join(different)}",
            where=where,
            fix="set them back, or train in another run folder",
        )
