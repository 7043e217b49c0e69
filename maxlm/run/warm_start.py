"""Parameters of other runs that training begins with: to start from
(``train.start_from``), and of frozen models that its task reads."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import compute_fingerprints
from maxlm.config import MaxlmError
from maxlm.models.params import (
    AUXILIARY,
    PackedParam,
    Params,
    StoredParam,
    drop_auxiliary,
    flatten_names,
    is_packed,
    join_path,
    replace_base_params,
    select_base_params,
)
from maxlm.optim.state import TrainState
from maxlm.run.setup import RunSetup
from maxlm.runtime.json_types import JsonMapping, JsonObject
from maxlm.tasks.task import AuxiliaryModel


def check_init_checkpoint(setup: RunSetup) -> JsonObject | None:
    """Checks that the run that this one starts from, if any, is there and has this
    model; returns its checkpoint's metadata."""
    start = setup.config.train.start_from
    if start is None:
        return None
    with open_checkpoints(start) as (tier, config, name):
        _check_quantization(setup, config)
        params = _select_stored_params(setup, config)
        tier.check_shapes(None, params, name)
        return tier.metadata()


def init_or_warm_start_state(setup: RunSetup) -> TrainState:
    """Returns a fresh state, with another run's parameters if the run starts from one.
    An adapted run takes those of one without an adapter as the base of its own; heads
    and a frontend that the other has not stay fresh."""
    state = setup.init_train_state()
    start = setup.config.train.start_from
    adapter = setup.config.adapter
    if start is None and adapter is None and AUXILIARY not in state.params:
        return state
    params = _warm_start_params(setup, drop_auxiliary(state.params))
    if AUXILIARY in state.params:
        auxiliary = _start_auxiliary_models(setup, state.params[AUXILIARY], params)
        params = params | {AUXILIARY: auxiliary}
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, ema=ema)


def _warm_start_params(setup: RunSetup, params: Params) -> Params:
    """Returns the run's own parameters with those of the run that it starts from."""
    start = setup.config.train.start_from
    adapter = setup.config.adapter
    # The parameters of the run to start from, in place of the fresh ones.
    is_start_adapted = False
    if start is not None:
        with open_checkpoints(start) as (tier, config, name):
            is_start_adapted = bool(config.get("adapter"))
            restored = _restore_start(setup, tier, config, name)
        fresh = params if is_start_adapted else select_base_params(params)
        if "heads" in params:
            heads = fresh["heads"] | restored.get("heads", {})
            restored = restored | {"heads": heads}
        if "frontend" in params:
            frontend = restored.get("frontend", fresh["frontend"])
            restored = restored | {"frontend": frontend}
        if is_start_adapted:
            params = restored
        else:
            params = replace_base_params(params, restored)

    # Some adapters begin as a function of the base's weights.
    if adapter is not None and not is_start_adapted:
        params = adapter.init_from_base(params)
    return params


def _start_auxiliary_models(
    setup: RunSetup, fresh: Mapping[str, Params], own_params: Params
) -> dict[str, Params]:
    """Returns the parameters that the task's auxiliary models start from.

    Args:
        fresh: their fresh ones, by the models' names.
        own_params: of the run's own model.
    """
    started: dict[str, Params] = {}
    for name, auxiliary in setup.config.task.auxiliary_models().items():
        params = dict(fresh[name])
        if auxiliary.source is None:
            # They are trained in full, whatever the run's own base is stored in.
            base = jax.tree.map(
                lambda param: _unpack_array(setup, param),
                select_base_params(own_params),
                is_leaf=is_packed,
            )
            for part in params.keys() - {"heads"}:
                # A copy: the step is given the memory of the whole state.
                params[part] = jax.tree.map(
                    lambda new, old: jnp.array(old, new.dtype), params[part], base[part]
                )
        else:
            abstract = setup.abstract_state.params[AUXILIARY][name]
            restored = _restore_auxiliary_model(auxiliary, abstract)
            restored["heads"] = params["heads"] | restored.get("heads", {})
            params = restored
        started[name] = params
    return started


def _restore_auxiliary_model(auxiliary: AuxiliaryModel, abstract: Params) -> Params:
    """Returns the parameters of an auxiliary model that a run has for it: all but the
    heads that it has not."""
    assert auxiliary.source is not None
    with open_checkpoints(auxiliary.source) as (tier, config, root):
        if config.get("adapter"):
            message = "a run with an adapter, which a model that is trained in full "
            message += "cannot start from"
            fix = "merge it first: maxlm convert"
            raise MaxlmError(message, where=auxiliary.source, fix=fix)
        stored_heads: Mapping[str, int] = config["model"].get("heads") or {}
        _check_stored_heads(stored_heads, auxiliary)
        # By their names here, those that the run has.
        names_there = {
            name: _find_head(stored_heads, name, width)
            for name, width in auxiliary.heads.items()
        }
        abstract_parts = {
            name: part for name, part in abstract.items() if name != "heads"
        }
        if stored_heads:
            abstract_parts["heads"] = {
                head: abstract["heads"][name]
                for name, head in names_there.items()
                if head is not None
            }
        restored = tier.restore(None, abstract_parts, root)
    if stored_heads:
        restored["heads"] = {
            name: restored["heads"][head]
            for name, head in names_there.items()
            if head is not None
        }
    return restored


def _check_stored_heads(
    stored_heads: Mapping[str, int], auxiliary: AuxiliaryModel
) -> None:
    """Raises MaxlmError: a run has heads that an auxiliary model has not."""
    taken = {
        _find_head(stored_heads, name, width) for name, width in auxiliary.heads.items()
    }
    others = sorted(stored_heads.keys() - taken)
    if others:
        heads = ", ".join(f"{name} of {stored_heads[name]}" for name in others)
        expected = ", ".join(
            f"{name} of {width}" for name, width in auxiliary.heads.items()
        )
        message = f"its model has heads that the one to train has not: {heads}; "
        message += f"that has {expected}"
        fix = "start from a run with one head of that width, or none"
        raise MaxlmError(message, where=auxiliary.source or "", fix=fix)


def _find_head(stored_heads: Mapping[str, int], name: str, width: int) -> str | None:
    """Returns the head of a run that another model's head starts from; None: it has
    none."""
    if stored_heads.get(name) == width:
        return name
    same_width = [head for head, size in stored_heads.items() if size == width]
    return same_width[0] if len(same_width) == 1 else None


def load_frozen_models(
    setup: RunSetup,
    init_state: Callable[[RunSetup], TrainState] = init_or_warm_start_state,
) -> dict[str, Params]:
    """Return the parameters of the models that the task only reads, by name;
    ``init_state`` returns the state that training starts from."""
    loaded: dict[str, Params] = {}
    for model, source in setup.frozen_sources.items():
        if source is None:
            # A copy: the step is given the memory of the whole state.
            own_params = drop_auxiliary(init_state(setup).params)
            loaded[model] = jax.tree.map(jnp.copy, own_params)
            continue
        with open_checkpoints(source) as (tier, _, name):
            loaded[model] = tier.restore(None, setup.abstract_state.frozen[model], name)
    return loaded


def describe_frozen_models(
    setup: RunSetup, frozen_params: Mapping[str, Params]
) -> JsonObject:
    """Return what checkpoints hold of frozen models: where each came from, and its
    fingerprint."""
    described = {}
    for name, params in frozen_params.items():
        fingerprints = compute_fingerprints(flatten_names(params))
        text = json.dumps(fingerprints, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        source = setup.frozen_sources[name]
        described[name] = {"source": source or "start", "fingerprint": fingerprint}
    return described


@contextmanager
def open_checkpoints(
    folder: str | Path, step: int | None = None
) -> Iterator[tuple[FolderTier, JsonMapping, str]]:
    """Yields a run's checkpoints, the config of one (default: the newest), and the name
    that the parameters to use have in them."""
    with FolderTier(Path(folder) / "checkpoints", read_only=True) as tier:
        config = tier.metadata(step)["config"]
        # A run that averages its parameters is used with the average.
        has_ema = config["train"].get("ema_decay") is not None
        yield tier, config, "ema" if has_ema else "params"


def _select_stored_params(setup: RunSetup, config: JsonMapping) -> Params:
    """Returns the arrays to restore of another run, with shapes, dtypes and shardings:
    without the adapter, the heads and the frontend that the other run's model has not,
    and dense where that one does not have them quantized."""
    params = setup.abstract_state.params
    if not config.get("adapter"):
        params = select_base_params(params)
    if not config.get("quantization"):
        params = jax.tree.map(
            lambda param: _describe_dense(setup, param), params, is_leaf=is_packed
        )
    stored_heads = config["model"].get("heads") or {}
    heads = {
        name: head_params
        for name, head_params in params.get("heads", {}).items()
        if name in stored_heads
    }
    left_out = {"heads", AUXILIARY}
    if config["model"].get("frontend") is None:
        left_out.add("frontend")
    selected = {
        name: subtree for name, subtree in params.items() if name not in left_out
    }
    if heads:
        selected["heads"] = heads
    return selected


def _describe_dense(setup: RunSetup, param: StoredParam) -> StoredParam:
    """Returns shape, dtype and sharding of the array that a packed parameter stands
    for; another's as they are."""
    if not isinstance(param, PackedParam):
        return param
    spec = param.dense_spec
    sharding = NamedSharding(setup.mesh, setup.placed.storage.spec(*spec.axes))
    return jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)


def _check_quantization(setup: RunSetup, config: JsonMapping) -> None:
    """Raises MaxlmError: the run to start from is quantized, and in another way."""
    stored = config.get("quantization")
    if not stored:
        return
    quantization = setup.config.quantization
    if quantization is None or quantization.model_dump(mode="json") != stored:
        message = f"the run is quantized ({stored.get('format')}), and this one is not "
        message += "in the same way"
        fix = (
            "set quantization to what its config.yaml has, or start from the run that "
        )
        fix += "it was made of"
        raise MaxlmError(message, where="train.start_from", fix=fix)


def _restore_start(
    setup: RunSetup, tier: FolderTier, config: JsonMapping, name: str
) -> Params:
    """Returns the parameters that another run has for this one. Matrices that this run
    alone has quantized are read and quantized one after the other, so that only one
    stands whole beside its codes."""
    _check_quantization(setup, config)
    stored = _select_stored_params(setup, config)
    if config.get("quantization") or setup.config.quantization is None:
        return tier.restore(None, stored, name)

    specs = setup.specs if config.get("adapter") else select_base_params(setup.specs)
    packed_specs: dict[str, PackedParam] = {}
    for param_name, spec in flatten_names(specs, is_packed).items():
        if isinstance(spec, PackedParam):
            packed_specs[param_name] = spec

    def select(names: set[str]) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, array: array if join_path(path) in names else None, stored
        )

    names = {*flatten_names(stored)}
    plain = select(names - packed_specs.keys())
    restored = tier.restore(None, plain, name, is_part=True)
    values = flatten_names(restored)
    for param_name, spec in packed_specs.items():
        dense = tier.restore(None, select({param_name}), name, is_part=True)
        (array,) = jax.tree.leaves(dense)
        values[param_name] = pack_array(setup, spec, array)
    ordered = [values[param_name] for param_name in flatten_names(stored)]
    return jax.tree.unflatten(jax.tree.structure(stored), ordered)


def pack_array(setup: RunSetup, spec: PackedParam, dense: jax.Array) -> PackedParam:
    """Packs an array, in the layouts of what it is stored as."""
    storage = setup.placed.storage
    layouts = jax.tree.map(lambda part: storage.spec(*part.axes), spec)
    pack = jax.sharding.auto_axes(spec.from_dense, out_sharding=layouts)
    with jax.set_mesh(setup.mesh):
        return jax.jit(pack)(dense)


def _unpack_array(setup: RunSetup, param: StoredParam) -> StoredParam:
    """Returns the array that a packed parameter stands for, in its storage layout;
    another parameter as it is."""
    if not isinstance(param, PackedParam):
        return param
    layout = setup.placed.storage.spec(*param.dense_spec.axes)
    merge = jax.sharding.auto_axes(lambda leaf: leaf.merge(), out_sharding=layout)
    with jax.set_mesh(setup.mesh):
        return jax.jit(merge)(param)
