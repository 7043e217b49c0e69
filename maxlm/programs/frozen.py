"""The models that a run's task reads and does not train."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config import MaxlmError, load_config
from maxlm.models.params import Params
from maxlm.programs.setup import Setup
from maxlm.run import RunConfig
from maxlm.train.checkpoint import FolderTier, group_sizes
from maxlm.train.checkpoint.fingerprint import compute_fingerprints
from maxlm.train.checkpoint.reading import named_leaves


def load_frozen_models(setup: Setup, init_params: Callable[[], Params]) -> dict[str, Params]:
    """Return the parameters of the models that the task only reads, by name.

    Args:
        init_params: returns the parameters that training starts from.

    Raises:
        MaxlmError: a run that is not there, or is of another model.
    """
    loaded: dict[str, Params] = {}
    for name, source in setup.frozen_sources.items():
        if source.folder is None:
            # A copy: the step is given the memory of the whole state.
            loaded[name] = jax.tree.map(jnp.copy, init_params())
            continue
        config = load_config(RunConfig, Path(source.folder) / "config.yaml").value
        kept = "params" if config.train.ema_decay is None else "ema"
        folder = Path(source.folder) / "checkpoints"
        groups = group_sizes(setup.frozen_models[name].specs)
        with FolderTier(folder, read_only=True, grouped=groups) as checkpoints:
            abstract = setup.abstract_state.frozen[name]
            loaded[name] = checkpoints.restore_params(None, abstract, name=kept)
    return loaded


def describe_frozen_models(setup: Setup, loaded: Mapping[str, Params]) -> dict[str, Any]:
    """Return what checkpoints hold of frozen models: where each came from, and its fingerprint."""
    described = {}
    for name, params in loaded.items():
        found = json.dumps(compute_fingerprints(named_leaves(params)), sort_keys=True).encode()
        source = setup.frozen_sources[name].folder
        fingerprint = hashlib.sha256(found).hexdigest()
        described[name] = {"source": source or "start", "fingerprint": fingerprint}
    return described


def check_frozen_models(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Check that frozen models are those that a checkpoint was trained with.

    Args:
        saved, now: as :func:`describe_frozen_models` returns them.

    Raises:
        MaxlmError: naming the first that is not.
    """
    for name, model in now.items():
        before = saved.get(name, {})
        if before.get("fingerprint") != model["fingerprint"]:
            raise MaxlmError(
                f"the frozen model {name!r} from {model['source']} is not the one that training "
                f"began with, from {before.get('source', 'nowhere')}",
                where=where,
                fix="put its parameters back, or train in another run folder",
            )
