"""A checkpoint's folder: ``state/``, every array under its canonical name (Orbax,
zarr3), and ``metadata/metadata`` (JSON, with a checksum of its own).

On disk layers are [layers, ...]; a circular pipeline holds them as [groups, layers /
groups, ...], in the same order. Each process reads what its own devices hold and waits
for no other, so that one that cannot read does not block the others.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike

from maxlm import __version__
from maxlm.config import MaxlmError
from maxlm.config.keys import select_leaves
from maxlm.config.show import compare_configs
from maxlm.models.params import AUXILIARY, flatten_names
from maxlm.parallel.layers import PyTree
from maxlm.runtime.collectives import raise_on_all_hosts
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.sharding import bind_mesh, jit_sharded

Result = TypeVar("Result")
Leaves = dict[str, Any]
Groups = Mapping[str, tuple[int, ...]]
"""(groups, layers a group) of parameters that are held in groups, by canonical name."""

_RETRY_SECONDS = (0.1, 1.0)  # pauses between tries
_CHECKSUM = "sha256"
# Odd constants of a multiplicative hash, one a dimension (Knuth's 2^32/φ and primes
# near it).
_FACTORS = (2_654_435_761, 2_246_822_519, 3_266_489_917, 668_265_263, 374_761_393)
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class UnreadableCheckpoint(MaxlmError):
    """A checkpoint that is damaged, or out of reach: another may be read in its
    place."""


def layer_group_shapes(specs: PyTree) -> Groups:
    """Returns ``layer_groups`` of a ``FolderTier``, from declarations
    (``ParamSpec``)."""
    leaves = flatten_names(specs).items()
    return {name: spec.shape[:2] for name, spec in leaves if spec.num_layer_axes == 2}


def flatten_layer_groups(leaves: Mapping[str, jax.Array], groups: Groups) -> Leaves:
    """Returns arrays in the shapes that are written: all layers along one axis."""

    # Moments have a parameter's name behind their own.
    def is_grouped(name: str, shape: tuple[int, ...]) -> bool:
        for parameter, group_shape in groups.items():
            if f".{name}".endswith(f".{parameter}"):
                return shape[:2] == group_shape
        return False

    flattened = {
        name: _flatten_groups(array)
        for name, array in leaves.items()
        if is_grouped(name, array.shape)
    }
    return _reshape(leaves, flattened)


def compute_fingerprints(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """Returns each array's fingerprint by name: a number that tells whether the array
    is, bit for bit, what it was. It is computed on the devices that hold the array, the
    same for every layout. All processes call it together; it waits for the arrays.

    Of the array's bits b_i as unsigned integers it is Σ b_i·w_i mod 2^32, w_i being an
    odd number mixed from the element's place. A changed element always shows (an odd
    factor loses no bit of the difference); elements that change places, or several
    changes at once, go unseen once in 2^32.
    """
    compute = _fingerprint_all
    meshes = [getattr(array.sharding, "mesh", None) for array in arrays.values()]
    mesh = next(filter(None, meshes), None)
    if mesh is not None:
        compute = bind_mesh(mesh, _fingerprint_all)
    fingerprints = jax.device_get(compute(dict(arrays)))
    return {name: int(value) for name, value in fingerprints.items()}


@jax.jit
def _fingerprint_all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _fingerprint(array) for name, array in arrays.items()}


def _fingerprint(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        bits = array.astype(jnp.uint32)
    else:
        word_dtype = _WORDS[array.dtype.itemsize]
        words = cast(jax.Array, lax.bitcast_convert_type(array, word_dtype))
        bits = words.astype(jnp.uint32)
    sharding = getattr(jax.typeof(array), "sharding", None)
    if sharding is not None and sharding.mesh.empty:
        sharding = None

    # A number of each element's place: its indices times odd constants, added up.
    place = jnp.zeros_like(bits)
    for axis in range(array.ndim):
        index = lax.broadcasted_iota(
            jnp.uint32, array.shape, axis, out_sharding=sharding
        )
        place = place + index * jnp.uint32(_FACTORS[axis % len(_FACTORS)])

    # Mixed as hash functions do, and made odd: modulo 2^32 a product with an odd number
    # differs for different bits, so a change of one element always shows.
    place = (place ^ (place >> 16)) * jnp.uint32(_FACTORS[1])
    weight = (place ^ (place >> 13)) | jnp.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def add_integrity_fields(
    step: int, arrays: Mapping[str, jax.Array], metadata: JsonMapping
) -> JsonObject:
    """Returns what is saved beside arrays: JSON values, the arrays' fingerprints and a
    checksum of all. All processes call it together; it waits for the arrays."""
    versions = {name: version(name) for name in ("jax", "orbax-checkpoint")}
    versions["maxlm"] = __version__
    complete = {
        "step": step,
        "versions": versions,
        **metadata,
        "fingerprints": compute_fingerprints(arrays),
    }
    return {**complete, _CHECKSUM: _compute_checksum(complete)}


def parse_metadata(text: str | bytes) -> JsonObject:
    """Returns what :func:`add_integrity_fields` returned, without its checksum; raises
    ValueError if it is damaged."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its metadata is nested without end") from None
    if not isinstance(value, dict):
        raise ValueError("its metadata is no JSON object")
    checksum = value.pop(_CHECKSUM, None)
    # Older versions wrote neither: damage to one of the names does not make it one of
    # theirs.
    is_newer = checksum is not None or "maxlm" in str(value.get("versions"))
    if is_newer and checksum != _compute_checksum(value):
        raise ValueError("its metadata is not what was saved")
    return value


def _compute_checksum(metadata: JsonMapping) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def read_metadata(path: Path) -> JsonObject:
    """Returns what was saved beside the state; raises UnreadableCheckpoint."""
    return with_retries(
        path, lambda: parse_metadata((path / "metadata" / "metadata").read_text())
    )


def restore_from(
    path: Path, abstract: PyTree, *, subtree: str = "", is_part: bool = False
) -> PyTree:
    """Returns the state in a checkpoint's folder, checked against its fingerprints; see
    :meth:`FolderTier.restore`. All processes call it together, and it ends alike on
    all. ``subtree``: name of the part of the state that ``abstract`` describes; empty:
    all of it, and the checkpoint must hold no other arrays. ``is_part``: whether the
    subtree may hold others."""

    def read() -> tuple[dict[str, int], Leaves, Leaves]:
        fingerprints = read_metadata(path).get("fingerprints", {})
        dtypes, leaves = check_saved_shapes(
            path, abstract, subtree=subtree, is_part=is_part
        )
        arguments = ocp.args.PyTreeRestore(
            item=leaves,
            restore_args=ocp.checkpoint_utils.construct_restore_args(leaves),
            partial_restore=bool(subtree),
        )
        state = epath.Path(path) / "state"
        arrays = with_retries(path, lambda: _handler().restore(state, args=arguments))
        return fingerprints, dtypes, arrays

    fingerprints, dtypes, arrays = raise_on_all_hosts(read)
    check_fingerprints(path, arrays, fingerprints, dtypes)
    leaves = _describe_leaves(abstract, subtree)
    arrays = _reshape(arrays, leaves)
    structure = jax.tree.structure(abstract)
    return jax.tree.unflatten(structure, [arrays[name] for name in leaves])


def check_saved_shapes(
    path: Path, abstract: PyTree, *, subtree: str = "", is_part: bool = False
) -> tuple[Leaves, Leaves]:
    """Checks, reading no array, that a checkpoint has the arrays that
    :func:`restore_from` reads; raises as :meth:`FolderTier.restore`. Returns by name
    dtypes as they are stored, and ``ShapeDtypeStruct`` as wanted, in shapes on disk."""
    state = epath.Path(path) / "state"
    stored = with_retries(path, lambda: _handler().metadata(state).tree)
    prefix = f"{subtree}." if subtree else ""
    leaves = _describe_leaves(abstract, subtree)
    # A run that is used, or started from, is its own model alone.
    auxiliary_prefix = f"{prefix}{AUXILIARY}."
    shapes = {
        name: tuple(array.shape)
        for name, array in stored.items()
        if name in leaves
        or (
            not is_part
            and name.startswith(prefix)
            and not (subtree and name.startswith(auxiliary_prefix))
        )
    }
    # Layers that this run holds in groups are along one axis on disk.
    for name, leaf in leaves.items():
        if len(leaf.shape) > 1:
            flat_leaf = _flatten_groups(leaf)
            if flat_leaf.shape == shapes.get(name):
                leaves[name] = flat_leaf
    # Parameters first: where they differ, moments do as a consequence.
    names = sorted(
        {*shapes, *leaves}, key=lambda name: (not name.startswith("params."), name)
    )
    for name in names:
        saved_shape = str(list(shapes[name])) if name in shapes else "absent"
        shape = str(list(leaves[name].shape)) if name in leaves else "absent"
        if saved_shape != shape:
            part = "optimizer or training state"
            if name.startswith("params."):
                part = "model"
            message = (
                f"checkpoint of another {part}: {name} is {saved_shape} in it, "
                f"{shape} in this run"
            )
            fix = "use the config it was trained with, or another run folder"
            raise MaxlmError(message, where=str(path), fix=fix)
    dtypes = {name: stored[name].dtype for name in leaves}
    for name, leaf in leaves.items():
        _check_castable(name, dtypes[name], leaf.dtype, path)
    return dtypes, leaves


def _check_castable(
    name: str, stored: DTypeLike, declared: DTypeLike, path: Path
) -> None:
    """Refuses a cast between kinds of numbers: weights cast to integers are all 0, 1 or
    -1."""
    stored_dtype = jnp.dtype(stored)
    declared_dtype = jnp.dtype(declared)
    for kind in (jnp.floating, jnp.integer, jnp.bool_):
        is_stored_kind = jnp.issubdtype(stored_dtype, kind)
        if is_stored_kind and jnp.issubdtype(declared_dtype, kind):
            return
    message = (
        f"{name} is {stored_dtype} in it, {declared_dtype} in this run, and a cast "
        "would lose its values"
    )
    fix = "use a checkpoint that holds it so (of a run with the same leaf), or the config without it"
    raise MaxlmError(message, where=str(path), fix=fix)


def check_fingerprints(
    path: Path,
    arrays: Leaves,
    fingerprints: Mapping[str, int],
    dtypes: Mapping[str, DTypeLike],
) -> None:
    """Checks arrays against the fingerprints saved with them, where there are any, and
    where they were not cast; raises UnreadableCheckpoint. All processes call it
    together, with one end."""
    comparable = {}
    for name, array in arrays.items():
        is_cast = array.dtype != dtypes.get(name, array.dtype)
        if name in fingerprints and not is_cast:
            comparable[name] = array
    changed = [
        name
        for name, fingerprint in compute_fingerprints(comparable).items()
        if fingerprint != fingerprints[name]
    ]
    if changed:
        others = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        message = f"unreadable: {changed[0]}{others} is not what was saved"
        raise UnreadableCheckpoint(message, where=str(path), fix="restore another step")


def _flatten_groups(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns shape and sharding on disk of an array that is held in groups."""
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)


def _reshape(
    arrays: Mapping[str, jax.Array], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns arrays in other shapes of the same order, in place on their devices.

    One program reshapes all: hosts would run several in different orders, and wait for
    each other.
    """
    changed = {
        name: array
        for name, array in arrays.items()
        if name in targets and array.shape != targets[name].shape
    }
    if not changed:
        return dict(arrays)
    shardings = {name: targets[name].sharding for name in changed}

    def reshape(changed: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {
            name: array.reshape(targets[name].shape) for name, array in changed.items()
        }

    # A leaf without a sharding lies on one device, which has no mesh.
    mesh = getattr(next(iter(shardings.values())), "mesh", None)
    if mesh is not None:
        reshape = bind_mesh(mesh, jit_sharded(reshape, shardings))
    return dict(arrays) | reshape(changed)


def _describe_leaves(abstract: PyTree, subtree: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shape, dtype and sharding (default: the first device) of arrays by
    name."""

    first_device = SingleDeviceSharding(jax.local_devices()[0])

    def describe_leaf(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first_device
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    prefix = f"{subtree}." if subtree else ""
    return {
        prefix + name: describe_leaf(leaf)
        for name, leaf in flatten_names(abstract).items()
    }


def _handler() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(use_zarr3=True)


def with_retries(place: Path | str, read: Callable[[], Result]) -> Result:
    """Returns what ``read`` returns. Storage fails in as many ways as there are
    backends, and some errors pass: it is tried again before the checkpoint counts as
    UnreadableCheckpoint."""
    pauses = iter(_RETRY_SECONDS)
    while True:
        try:
            return read()
        except MaxlmError:
            raise
        except Exception as error:
            # Orbax, TensorStore and file systems have no class of errors in common.
            pause = next(pauses, None)
            if pause is None:
                message = f"unreadable ({describe_error(error)})"
                fix = "restore another step"
                raise UnreadableCheckpoint(
                    message, where=str(place), fix=fix
                ) from error
        time.sleep(pause)


@contextmanager
def convert_storage_errors(message: str, place: Path | str, fix: str) -> Iterator[None]:
    """Turns the errors of all storage backends into MaxlmError."""
    try:
        yield
    except MaxlmError:
        raise
    except Exception as error:
        # Orbax, TensorStore and file systems have no class of errors in common.
        message = f"{message} ({describe_error(error)})"
        raise MaxlmError(message, where=str(place), fix=fix) from error


def describe_error(error: Exception) -> str:
    """Returns the first line of an error's text; of a long one the beginning and the
    end, which tells the cause; the error's class without a text."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    # TensorStore's texts end in [source locations=...].
    text = lines[0].split(" [")[0]
    if len(text) > 200:
        text = f"{text[:80]} … {text[-120:]}"
    return text


def check_same_settings(
    saved: JsonMapping,
    current: JsonMapping,
    keys: Sequence[str],
    where: str = "resume",
    action: str = "the checkpoint was written",
    ignored: Sequence[str] = (),
) -> None:
    """Checks that a saved config has the same values as the current one where it must;
    raises MaxlmError naming every key that differs, with both values.

    Args:
        keys: dotted keys that must be equal, each with all below it ("model",
            "data.seed").
        action: what was done with the saved config, for the message.
        ignored: patterns of keys among them that may differ ("data.sources.*.weight").
    """
    differences = compare_configs(
        select_leaves(saved, keys, ignored), select_leaves(current, keys, ignored)
    )
    different = [
        f"{key}={saved_value!r} became {value!r}"
        for key, saved_value, value in differences
    ]
    if different:
        message = f"{action} with another config: {', '.join(different)}"
        raise MaxlmError(
            message, where=where, fix="set them back, or train in another run folder"
        )
