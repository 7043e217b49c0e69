"""Parameters of other runs: to use, to start from (``train.start_from``), to read
beside one's own.

A run is used with the moving average of its parameters where it has one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxlm.checkpoint.folder import FolderTier
from maxlm.checkpoint.reading import compute_fingerprints
from maxlm.config import MaxlmError, load_config
from maxlm.data.tokenizer import Tokenizer, load_tokenizer
from maxlm.huggingface.peft.settings import CONFIG as PEFT_CONFIG
from maxlm.models.adapters import merge_adapter
from maxlm.models.architectures import Model
from maxlm.models.params import (
    Params,
    bind_specs,
    flatten_names,
    is_leaf,
    join_path,
    replace_base_params,
    select_base_params,
)
from maxlm.optim.state import TrainState
from maxlm.run.config import RunConfig
from maxlm.run.convert import (
    AdaptedHuggingFaceModel,
    HuggingFaceModel,
    open_adapted_model,
    open_huggingface_model,
)
from maxlm.run.setup import RunSetup, set_up_run
from maxlm.runtime.json_files import read_json_object
from maxlm.sharding import MeshConfig, count_min_devices


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it."""

    config: RunConfig
    mesh: Mesh
    model: Model
    params: Params
    tokenizer: Tokenizer
    step: int


def load_run(
    folder: str | Path,
    *,
    step: int | None = None,
    mesh: MeshConfig | None = None,
    merge: bool = True,
) -> LoadedRun:
    """Loads the parameters of a run's checkpoint (default: the newest), whatever mesh
    wrote them, on ``mesh`` (default: one device). ``merge``: adapters that can be are
    merged into the base."""
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        what = "no run here (no config.yaml)"
        raise MaxlmError(what, where=str(folder), fix="name a folder like runs/demo")
    setup = _set_up_to_use(load_config(RunConfig, folder / "config.yaml").value, mesh)
    with _open_checkpoints(folder, step) as (tier, _, name):
        step = tier.latest() if step is None else step
        params = tier.restore(step, setup.abstract_state.params, name)
    loaded = LoadedRun(
        setup.config,
        setup.mesh,
        setup.model,
        params,
        load_tokenizer(folder / "tokenizer"),
        step or 0,
    )
    return _merge_loaded(loaded, setup.specs) if merge else loaded


def _merge_loaded(loaded: LoadedRun, specs: Params) -> LoadedRun:
    """A model with its adapter merged, where it has one that can be."""
    config = loaded.config
    if config.adapter is None:
        return loaded
    with jax.set_mesh(loaded.mesh):
        specs, params = merge_adapter(specs, loaded.params)
    if not any(map(is_leaf, flatten_names(specs, is_leaf).values())):
        config = config.model_copy(update={"adapter": None})
    return replace(
        loaded, config=config, model=bind_specs(loaded.model, specs), params=params
    )


def load_model(
    folder: str | Path, *, step: int | None = None, mesh: MeshConfig | None = None
) -> LoadedRun:
    """Loads a model to use: a run's, as :func:`load_run` does; a Hugging Face folder's
    (config.json, safetensors, tokenizer); or that of an adapter of PEFT's, merged,
    where its base is a folder of this machine. Of the latter two nothing is written.
    Raises MaxlmError: a folder that is none of these, a tokenizer that is missing, a
    damaged file."""
    folder = Path(folder)
    if (folder / "config.yaml").exists():
        return load_run(folder, step=step, mesh=mesh)
    is_adapter = (folder / PEFT_CONFIG).exists()
    if not (is_adapter or (folder / "config.json").exists()):
        found = (
            "neither config.yaml nor config.json here"
            if folder.is_dir()
            else "no such folder"
        )
        fix = "name a run's folder, such as runs/demo, or a Hugging Face checkpoint's"
        raise MaxlmError(found, where=str(folder), fix=fix)
    if step is not None:
        what = f"--step {step} names a run's checkpoint, and this is a published one"
        raise MaxlmError(what, where=str(folder), fix="leave it out")
    name = folder.resolve().name.lstrip(".- ") or "model"
    base_folder = _find_adapter_base(folder) if is_adapter else folder
    opened: HuggingFaceModel | AdaptedHuggingFaceModel
    opened = open_huggingface_model(base_folder, Path("runs", name))
    if is_adapter:
        opened = open_adapted_model(opened, folder)
    if opened.tokenizer is None:
        what, fix = (
            "no tokenizer.json or tokenizer.model here",
            "copy the checkpoint's here",
        )
        raise MaxlmError(what, where=str(folder), fix=fix)
    setup = _set_up_to_use(opened.config, mesh)
    writer = _MemoryWriter()
    opened.import_tensors(writer)

    def place(path: Any, sharding: Any) -> jax.Array:
        return jax.device_put(writer.arrays.pop(join_path(path)), sharding)

    params = jax.tree_util.tree_map_with_path(place, setup.shardings.params)
    loaded = LoadedRun(
        setup.config, setup.mesh, setup.model, params, opened.tokenizer, 0
    )
    return _merge_loaded(loaded, setup.specs)


def _find_adapter_base(folder: Path) -> Path:
    """The folder of the model that an adapter of PEFT's says that it is for."""
    named = read_json_object(folder / PEFT_CONFIG, "save the adapter again").get(
        "base_model_name_or_path"
    )
    base = Path(named).expanduser() if isinstance(named, str) and named else None
    if base is None or not (base / "config.json").exists():
        what = f"its base, base_model_name_or_path={named!r}, is no Hugging Face folder here"
        fix = f"make a run of both: maxlm convert {folder} runs/NAME --base FOLDER"
        raise MaxlmError(what, where=str(folder / PEFT_CONFIG), fix=fix)
    return base


class _MemoryWriter:
    def __init__(self):
        self.arrays: dict[str, np.ndarray] = {}

    def declare(
        self, name: str, shape: tuple[int, ...], num_lead_axes: int = 0
    ) -> None:
        self.arrays[name] = np.empty(shape, np.float32)

    def write(self, name: str, lead_index: tuple[int, ...], values: np.ndarray) -> None:
        self.arrays[name][lead_index] = values


def _set_up_to_use(config: RunConfig, mesh: MeshConfig | None) -> RunSetup:
    """Places a model on the first devices that ``mesh`` needs (default: one; with -1:
    all)."""
    config = config.model_copy(update={"mesh": mesh or MeshConfig()})
    devices = jax.devices() if mesh else jax.local_devices()[:1]
    if mesh and -1 not in mesh.model_dump().values():
        devices = devices[: count_min_devices(mesh)]
    return set_up_run(config, devices, for_training=False)


def check_init_checkpoint(setup: RunSetup) -> dict[str, Any] | None:
    """Checks that the run that this one starts from, if any, is there and has this
    model; returns its checkpoint's metadata."""
    start, wanted = setup.config.train.start_from, setup.abstract_state.params
    if start is None:
        return None
    with _open_checkpoints(start) as (tier, config, name):
        tier.check_shapes(None, _select_stored_params(wanted, config), name)
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
        with _open_checkpoints(start) as (tier, config, name):
            adapted = bool(config.get("adapter"))
            found = tier.restore(None, _select_stored_params(abstract, config), name)
            if "heads" in params:
                fresh = params if adapted else select_base_params(params)
                found = found | {"heads": fresh["heads"] | found.get("heads", {})}
            params = found if adapted else replace_base_params(params, found)
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
        with _open_checkpoints(source) as (tier, _, name):
            loaded[model] = tier.restore(None, setup.abstract_state.frozen[model], name)
    return loaded


def describe_frozen_models(
    setup: RunSetup, frozen_params: Mapping[str, Params]
) -> dict[str, Any]:
    """Return what checkpoints hold of frozen models: where each came from, and its
    fingerprint."""
    described = {}
    for name, params in frozen_params.items():
        found = json.dumps(
            compute_fingerprints(flatten_names(params)), sort_keys=True
        ).encode()
        source = setup.frozen_sources[name]
        fingerprint = hashlib.sha256(found).hexdigest()
        described[name] = {"source": source or "start", "fingerprint": fingerprint}
    return described


@contextmanager
def _open_checkpoints(
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
        name: own for name, own in params.get("heads", {}).items() if name in stored
    }
    rest = {name: own for name, own in params.items() if name != "heads"}
    return rest | {"heads": heads} if heads else rest
