"""Parameters of other runs that training begins with: to start from
(``train.start_from``), and of frozen models that its task reads."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def check_init_checkpoint(setup: RunSetup) -> dict[str, Any] | None:
    """Checks that the run that this one starts from, if any, is there and has this
    model; returns its checkpoint's metadata."""
    start, abstract_params = setup.config.train.start_from, setup.abstract_state.params
    if start is None:
        return None
    with open_checkpoints(start) as (tier, config, name):
        tier.check_shapes(None, _select_stored_params(abstract_params, config), name)
        return tier.metadata()


def init_or_warm_start_state(setup: RunSetup) -> TrainState:
    """Returns a fresh state, with another run's parameters if the run starts from one.
    An adapted run takes those of one without an adapter as the base of its own; heads
    that the other has not stay fresh."""
    state = setup.init_train_state()
    start = setup.config.train.start_from
    adapter, abstract, params = (
        setup.config.adapter,
        setup.abstract_state.params,
        state.params,
    )
    if start is None and adapter is None:
        return state
    adapted = False
    if start is not None:
        with open_checkpoints(start) as (tier, config, name):
            adapted = bool(config.get("adapter"))
            restored = tier.restore(None, _select_stored_params(abstract, config), name)
            if "heads" in params:
                fresh = params if adapted else select_base_params(params)
                restored = restored | {
                    "heads": fresh["heads"] | restored.get("heads", {})
                }
            params = restored if adapted else replace_base_params(params, restored)
    if adapter is not None and not adapted:
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
) -> dict[str, Any]:
    """Return what checkpoints hold of frozen models: where each came from, and its
    fingerprint."""
    described = {}
    for name, params in frozen_params.items():
        fingerprints = json.dumps(
            compute_fingerprints(flatten_names(params)), sort_keys=True
        ).encode()
        source = setup.frozen_sources[name]
        fingerprint = hashlib.sha256(fingerprints).hexdigest()
        described[name] = {"source": source or "start", "fingerprint": fingerprint}
    return described


@contextmanager
def open_checkpoints(
    folder: str | Path, step: int | None = None
) -> Iterator[tuple[FolderTier, Mapping[str, Any], str]]:
    """Yields a run's checkpoints, the config of one (default: the newest), and the name
    that the parameters to use have in them."""
    with FolderTier(Path(folder) / "checkpoints", read_only=True) as tier:
        config = tier.metadata(step)["config"]
        yield (
            tier,
            config,
            "ema" if config["train"].get("ema_decay") is not None else "params",
        )


def _select_stored_params(params: Params, config: Mapping[str, Any]) -> Params:
    """Leaves out the adapter and the heads that another run's model has not."""
    params = params if config.get("adapter") else select_base_params(params)
    stored = config["model"].get("heads") or {}
    heads = {
        name: head_params for name, head_params in params.get("heads", {}).items() if name in stored
    }
    rest = {name: head_params for name, head_params in params.items() if name != "heads"}
    return rest | {"heads": heads} if heads else rest
