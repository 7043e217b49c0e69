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

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import compute_fingerprints
from maxlm.models.params import (
    Params,
    flatten_names,
    replace_base_params,
    select_base_params,
)
from maxlm.optim.state import TrainState
from maxlm.run.setup import RunSetup
from maxlm.runtime.json_types import JsonMapping, JsonObject


def check_init_checkpoint(setup: RunSetup) -> JsonObject | None:
    """Checks that the run that this one starts from, if any, is there and has this
    model; returns its checkpoint's metadata."""
    start = setup.config.train.start_from
    if start is None:
        return None
    with open_checkpoints(start) as (tier, config, name):
        params = _select_stored_params(setup.abstract_state.params, config)
        tier.check_shapes(None, params, name)
        return tier.metadata()


def init_or_warm_start_state(setup: RunSetup) -> TrainState:
    """Returns a fresh state, with another run's parameters if the run starts from one.
    An adapted run takes those of one without an adapter as the base of its own; heads
    and a frontend that the other has not stay fresh."""
    state = setup.init_train_state()
    params = state.params
    start = setup.config.train.start_from
    adapter = setup.config.adapter
    if start is None and adapter is None:
        return state

    # The parameters of the run to start from, in place of the fresh ones.
    is_start_adapted = False
    if start is not None:
        with open_checkpoints(start) as (tier, config, name):
            is_start_adapted = bool(config.get("adapter"))
            abstract_params = _select_stored_params(setup.abstract_state.params, config)
            restored = tier.restore(None, abstract_params, name)
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
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return replace(state, params=params, ema=ema)


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
            loaded[model] = jax.tree.map(jnp.copy, init_state(setup).params)
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


def _select_stored_params(params: Params, config: JsonMapping) -> Params:
    """Leaves out the adapter, the heads and the frontend that another run's model has
    not."""
    if not config.get("adapter"):
        params = select_base_params(params)
    stored_heads = config["model"].get("heads") or {}
    heads = {
        name: head_params
        for name, head_params in params.get("heads", {}).items()
        if name in stored_heads
    }
    left_out = {"heads"}
    if config["model"].get("frontend") is None:
        left_out.add("frontend")
    selected = {
        name: subtree for name, subtree in params.items() if name not in left_out
    }
    if heads:
        selected["heads"] = heads
    return selected
